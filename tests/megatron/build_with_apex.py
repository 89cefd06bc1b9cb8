"""Builds models in a process in which a STUB stands in for Apex, as if it were installed.

Apex's norms need a GPU, and Megatron looks for them at import. The stub has the one name that it
looks for, and computes nothing: a model that runs has no norm of Apex's.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types


def install_stub_of_apex() -> None:
    """Before Megatron is imported."""
    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        sys.modules[name] = module
    sys.modules[name].FusedLayerNormAffineFunction = type("FusedLayerNormAffineFunction", (), {})


def norms() -> dict[str, list[str]]:
    """Kind of model -> classes of its layers' norms and of its last one."""
    from megatron.core.models import backends
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_prefix.config import ParallelConfig
    from megatron_prefix.layer_spec import prefix_grouped, prefix_grouped_layer_spec
    from megatron_prefix.model.build import build_gpt_model
    from megatron_prefix.model.transformer_config import transformer_config
    from tests.megatron.models import TRAINING, model_config, single_process

    assert backends.HAVE_APEX
    found = {}
    with single_process():
        # A local spec of Megatron's for RMSNorm takes Apex's norm from all that come after it.
        for normalization in ("LayerNorm", "RMSNorm"):
            model = model_config({"normalization": normalization, "qk_layernorm": True})
            for on_gpu in (False, True):
                config = transformer_config(model, ParallelConfig(), TRAINING)
                layer = prefix_grouped(get_gpt_layer_local_spec(qk_layernorm=True))
                for name, spec in {
                    "block": None,
                    "layer": layer,
                    "--spec": prefix_grouped_layer_spec,
                }.items():
                    # Stands for a model on a GPU; norms are built on the CPU all the same.
                    config.use_cpu_initialization = not on_gpu
                    if spec is None:
                        built = build_gpt_model(model, config)
                    else:
                        built = GPTModel(config, spec, vocab_size=61, max_sequence_length=64)
                    attention = built.decoder.layers[0].self_attention
                    found[f"{normalization}, {name}, {'gpu' if on_gpu else 'cpu'}"] = [
                        type(norm).__name__
                        for norm in (
                            built.decoder.layers[0].input_layernorm,
                            attention.q_layernorm,
                            built.decoder.final_layernorm,
                        )
                    ]
    return found


if __name__ == "__main__":
    install_stub_of_apex()
    print(json.dumps(norms()))
