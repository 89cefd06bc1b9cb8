"""The names of verl that the integration relies on. A new release of verl fails here first."""

from __future__ import annotations

import dataclasses
import inspect
from types import ModuleType

import pytest
import verl
from verl.utils.device import get_vendor
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron import MegatronEngineWithValueHead, transformer_impl

import megatron_prefix.integrations.verl
from megatron_prefix.integrations.verl import names
from megatron_prefix.integrations.verl.engine import PrefixMegatronEngine


@pytest.fixture
def trainers() -> ModuleType:
    """verl's trainers; they ask for packages that verl does not name."""
    return pytest.importorskip("tests.integrations.verl.trainers")


def test_the_release_is_the_tested_one() -> None:
    assert verl.__version__ == names.TESTED_RELEASE


@pytest.mark.parametrize("name", names.ENGINE_NAMES, ids=lambda name: name.path)
def test_verls_engine_has(name: names.Name) -> None:
    assert name.fault() is None


@pytest.mark.parametrize(
    "name", [*names.V1_TRAINER_NAMES, *names.V0_TRAINER_NAMES], ids=lambda name: name.path
)
def test_verls_trainers_have(trainers: ModuleType, name: names.Name) -> None:
    assert name.fault() is None


def test_verls_configurations_have_the_fields_that_are_read() -> None:
    names.check_fields()


def test_a_field_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"verl.workers.config.HFModelConfig": ("mtp", "no_such_field")}
    monkeypatch.setattr(names, "ENGINE_FIELDS", {**fields, "verl.workers.config.NoSuchConfig": ()})
    with pytest.raises(
        ImportError, match="HFModelConfig has no field no_such_field any more; verl"
    ):
        names.check_fields()


def test_our_engine_comes_before_verls_own() -> None:
    assert megatron_prefix.integrations.verl.__doc__
    assert get_vendor() == "nvidia"  # also where there is no GPU
    assert EngineRegistry.get_engine_cls("language_model", "megatron") is PrefixMegatronEngine


def test_value_models_keep_verls_engine() -> None:
    assert EngineRegistry.get_engine_cls("value_model", "megatron") is MegatronEngineWithValueHead


def test_our_methods_are_called_as_verls_are() -> None:
    for method in ("__init__", "initialize", "forward_backward_batch", "forward_step"):
        ours = inspect.signature(getattr(PrefixMegatronEngine, method)).parameters
        own = inspect.signature(getattr(transformer_impl.MegatronEngineWithLMHead, method))
        assert list(ours) == list(own.parameters), method


def test_microbatches_are_asked_for_by_name() -> None:
    source = inspect.getsource(transformer_impl.MegatronEngine.forward_backward_batch)
    assert source.count("= prepare_micro_batches(\n                data=data,\n") == 1


def test_trainers_classes_are_ours_to_change(trainers: ModuleType) -> None:
    assert "_balance_batch" in vars(trainers.PPOTrainer)
    assert "_balance_batch" in vars(trainers.RayPPOTrainer)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"path": "no_such_function"}, "no_such_function is gone"),
        ({"path": "NoSuchClass.method"}, "NoSuchClass.method is gone"),
        ({"module": "verl.no_such_module"}, "verl.no_such_module.prepare_micro_batches is gone"),
        ({"mentions": ("no_such_key",)}, "prepare_micro_batches has no no_such_key any more"),
        ({"parameters": ("data", "renamed")}, "prepare_micro_batches has no renamed any more"),
    ],
)
def test_a_changed_verl_is_refused_in_one_line(changed: dict, fault: str) -> None:
    (name,) = (name for name in names.ENGINE_NAMES if name.path == "prepare_micro_batches")
    with pytest.raises(ImportError, match=fault) as raised:
        names.check_names((dataclasses.replace(name, **changed),))
    assert "\n" not in str(raised.value)
    assert "Install verl==0.9.1" in str(raised.value)
