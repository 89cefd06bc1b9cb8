"""The flash-attn packages' private calls: bound to the signatures of real releases, or refused.

The signatures were read off the releases' sources (`name=` has a default). Where a package is
installed, its own are bound as well. What these tests do not cover: that the calls compute what
they are expected to, which takes a GPU (test_kernel_accuracy.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_prefix.attention.kernels import flash_attn_calls
from megatron_prefix.attention.kernels.flash_attn_calls import (
    FLASH_ATTN_2,
    FLASH_ATTN_3,
    FLASH_ATTN_4,
    WINDOW,
    Call,
    Package,
    UnknownSignatureError,
    load,
    parameters_of,
)

FA2_FORWARD = (
    "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal "
    "window_size_left= window_size_right= softcap= alibi_slopes= return_softmax= block_table= "
    "leftpad_k= seqused_k= zero_tensors="
)
FA2_BACKWARD = (
    "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k "
    "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes "
    "deterministic rng_state= zero_tensors="
)
FA3_FORWARD_2025_01 = (
    "q k v k_new v_new out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k "
    "max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin q_descale "
    "k_descale v_descale softmax_scale causal window_size= sink_token_length= softcap= "
    "rotary_interleaved= num_splits= pack_gqa= sm_margin="
)
FA3_BACKWARD_2025_01 = (
    "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k sequed_q sequed_k max_seqlen_q "
    "max_seqlen_k dq dk dv softmax_scale causal window_size= sink_token_length= softcap= "
    "deterministic= sm_margin="
)
FA3_FORWARD_2025_04 = (
    "q k v k_new v_new qv out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k "
    "max_seqlen_q max_seqlen_k page_table kv_batch_idx leftpad_k rotary_cos rotary_sin "
    "seqlens_rotary q_descale k_descale v_descale softmax_scale causal window_size= "
    "attention_chunk= softcap= rotary_interleaved= scheduler_metadata= num_splits= pack_gqa= "
    "sm_margin="
)
FA3_FORWARD_2026 = (
    "q k v k_new= v_new= qv= out_= cu_seqlens_q= cu_seqlens_k= cu_seqlens_k_new= seqused_q= "
    "seqused_k= max_seqlen_q= max_seqlen_k= page_table= kv_batch_idx= leftpad_k= rotary_cos= "
    "rotary_sin= seqlens_rotary= q_descale= k_descale= v_descale= softmax_scale= causal= "
    "window_size_left= window_size_right= attention_chunk= softcap= rotary_interleaved= "
    "scheduler_metadata= num_splits= pack_gqa= sm_margin="
)
FA3_BACKWARD_2026 = (
    "dout q k v out softmax_lse cu_seqlens_q= cu_seqlens_k= sequed_q= sequed_k= max_seqlen_q= "
    "max_seqlen_k= dq= dk= dv= softmax_scale= is_causal= window_size_left= window_size_right= "
    "softcap= deterministic= sm_margin="
)
FA4_FORWARD_B5 = (
    "q k v cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= "
    "page_table= softmax_scale= causal= softcap= window_size_left= window_size_right= "
    "learnable_sink= tile_mn= mma_pv_is_rs= intra_wg_overlap= num_threads= num_splits= pack_gqa= "
    "_arch= score_mod= mask_mod= block_sparse_tensors= return_lse= out= lse= aux_tensors="
)
FA4_FORWARD_B36 = (
    "q k v qv= cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= "
    "min_seqlen_k= page_table= softmax_scale= causal= softcap= window_size_left= "
    "window_size_right= learnable_sink= tile_mn= mma_pv_is_rs= intra_wg_overlap= num_threads= "
    "num_splits= pack_gqa= _arch= score_mod= mask_mod= block_sparse_tensors= return_lse= out= "
    "lse= aux_tensors= aux_scalars= q_descale= k_descale= v_descale= gather_kv_indices= "
    "scheduler_metadata= seqlen_k_per_split= disable_scheduler_metadata= gather_bwd_recompute_p="
)
FA4_BACKWARD = (
    "q k v out dout lse softmax_scale= causal= softcap= window_size_left= window_size_right= "
    "m_block_size= n_block_size= num_threads= pack_gqa= num_stages_Q= num_stages_dO= "
    "SdP_swapAB= dKV_swapAB= dQ_swapAB= AtomLayoutMSdP= AtomLayoutNdKV= AtomLayoutMdQ= V_in_regs= "
    "cu_seqlens_q= cu_seqlens_k= seqused_q= seqused_k= max_seqlen_q= max_seqlen_k= "
    "deterministic= dq= dk= dv= score_mod= score_mod_bwd= mask_mod= aux_tensors= "
    "block_sparse_tensors= dlse="
)

RELEASES = [
    pytest.param(FLASH_ATTN_2.forward, FA2_FORWARD, id="2.7.4.post1 and 2.8.3, forward"),
    pytest.param(FLASH_ATTN_2.forward, f"{FA2_FORWARD} num_splits=", id="2026-04, forward"),
    pytest.param(FLASH_ATTN_2.backward, FA2_BACKWARD, id="2.7.4.post1 and 2.8.3, backward"),
    pytest.param(FLASH_ATTN_3.forward, FA3_FORWARD_2025_01, id="hopper 2025-01, forward"),
    pytest.param(FLASH_ATTN_3.backward, FA3_BACKWARD_2025_01, id="hopper 2025-01, backward"),
    pytest.param(FLASH_ATTN_3.forward, FA3_FORWARD_2025_04, id="hopper 2025-04, forward"),
    pytest.param(FLASH_ATTN_3.forward, FA3_FORWARD_2026, id="hopper 2025-11 to 2026-08, forward"),
    pytest.param(FLASH_ATTN_3.backward, FA3_BACKWARD_2026, id="hopper 2025-11, backward"),
    pytest.param(FLASH_ATTN_4.forward, FA4_FORWARD_B5, id="4.0.0b5, forward"),
    pytest.param(FLASH_ATTN_4.forward, FA4_FORWARD_B36, id="4.0.0b36, forward"),
    pytest.param(FLASH_ATTN_4.backward, FA4_BACKWARD, id="4.0.0b5 and b14, backward"),
    pytest.param(
        FLASH_ATTN_4.backward,
        f"{FA4_BACKWARD} aux_scalars= learnable_sink=",
        id="4.0.0b36, backward",
    ),
]


def function_with(signature: str) -> Callable[..., dict[str, Any]]:
    """A function of this signature that returns its arguments."""
    parameters = ", ".join(
        name if not name.endswith("=") else f"{name}'default'" for name in signature.split()
    )
    namespace: dict[str, Any] = {}
    exec(f"def function({parameters}): return dict(locals())", namespace)
    return namespace["function"]


@pytest.mark.parametrize(("call", "signature"), RELEASES)
def test_calls_fit_the_signatures_of_releases(call, signature):
    function = function_with(signature)
    values = {name: f"our {name}" for name in call.needed}
    received = call.bound_to(function)(**values)
    for name, value in values.items():
        own = name if name in received else call.other_names[name]
        assert received.pop(own) == value
    for name, value in received.items():
        # Whatever else it has is a constant of ours, or its own default.
        assert value == call.constants.get(name, "default"), name


@pytest.mark.parametrize(
    ("call", "signature", "message"),
    [
        pytest.param(
            FLASH_ATTN_2.forward,
            FA2_FORWARD.replace("window_size_left= window_size_right=", "window_size"),
            "its _flash_attn_varlen_forward has no argument 'window_size_left'",
            id="flash-attn 2.6, whose lse has another layout",
        ),
        pytest.param(
            FLASH_ATTN_2.backward,
            FA2_BACKWARD.replace("deterministic ", ""),
            "its _flash_attn_varlen_backward has no argument 'deterministic'",
            id="no deterministic backward",
        ),
        pytest.param(
            FLASH_ATTN_3.forward,
            "q k v softmax_scale causal window_size descale_q= descale_k= descale_v=",
            "its _flash_attn_forward has no argument 'cu_seqlens_q'",
            id="hopper 2024, without variable lengths",
        ),
        pytest.param(
            FLASH_ATTN_4.forward,
            f"{FA4_FORWARD_B36.replace('q k v', 'q k v mask')}",
            "its _flash_attn_fwd asks for 'mask'",
            id="an argument that nobody knows",
        ),
        pytest.param(
            FLASH_ATTN_4.backward,
            FA4_BACKWARD.replace("max_seqlen_q= max_seqlen_k= ", ""),
            "its _flash_attn_bwd has no argument 'max_seqlen_q'",
            id="flash-attn-4 before 2026",
        ),
    ],
)
def test_other_signatures_are_refused_with_the_argument(call, signature, message):
    with pytest.raises(UnknownSignatureError) as error:
        call.bound_to(function_with(signature))
    assert str(error.value) == message


def test_parameters_of_a_custom_op_are_those_of_its_schema():
    @torch.library.custom_op("megatron_prefix_test::call", mutates_args=())
    def call(q: torch.Tensor, scale: float, window: int = -1) -> torch.Tensor:
        return q * scale * window

    assert parameters_of(call) == {"q": False, "scale": False, "window": True}
    bound = Call(function="call", needed=("q",), constants={"scale": 2.0}).bound_to(call)
    assert torch.equal(bound(q=torch.ones(2)), torch.full((2,), -2.0))


def test_a_window_takes_the_place_of_the_constants_and_old_releases_have_none():
    function = function_with(FA2_BACKWARD)
    values = {name: name for name in FLASH_ATTN_2.backward.needed}
    call = FLASH_ATTN_2.backward.bound_to(function)
    assert [call(**values)[name] for name in WINDOW] == [-1, -1]
    window = dict(zip(WINDOW, (7, 0), strict=True))
    assert [call(**values, **window)[name] for name in WINDOW] == [7, 0]
    old = FLASH_ATTN_3.forward.bound_to(function_with(FA3_FORWARD_2025_04))
    with pytest.raises(TypeError, match="window_size_left"):
        old(**{name: name for name in FLASH_ATTN_3.forward.needed}, **window)


def package(module: str, forward: str = "forward") -> Package:
    return Package(
        name="some-package",
        module=module,
        forward=Call(function=forward, needed=("x",)),
        backward=Call(function="backward", needed=("x",)),
    )


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "kernels_broken.py").write_text("raise OSError('undefined symbol')")
    (tmp_path / "kernels_whole.py").write_text("def forward(x): ...\ndef backward(y): ...")
    (tmp_path / "kernels_parent").mkdir()
    (tmp_path / "kernels_parent" / "__init__.py").write_text("import no_such_extension")
    assert load(package("no_such_module.part")) == "the package some-package is not installed"
    (tmp_path / "kernels_windows.py").write_text(
        "def forward(x, window_size_left=-1, window_size_right=-1): ...\ndef backward(x): ..."
    )
    assert not load(package("kernels_windows")).windows
    assert load(package("kernels_broken")) == (
        "importing some-package fails with OSError: undefined symbol"
    )
    assert "no_such_extension" in load(package("kernels_parent.part"))
    assert load(package("kernels_whole", "varlen")) == (
        "this release of some-package has no kernels_whole.varlen"
    )
    assert load(package("kernels_whole")) == (
        "this release of some-package is not known: its backward has no argument 'x'"
    )


@pytest.mark.parametrize(
    "installed", [FLASH_ATTN_2, FLASH_ATTN_3, FLASH_ATTN_4], ids=lambda p: p.name
)
def test_the_installed_release_has_a_known_signature(installed):
    loaded = load(installed)
    if isinstance(loaded, str) and not loaded.startswith("this release"):
        pytest.skip(loaded)
    assert isinstance(loaded, flash_attn_calls.BoundPackage), loaded
    assert inspect.isfunction(loaded.forward)
