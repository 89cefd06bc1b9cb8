"""Layers that predict further tokens, in small Hugging Face folders, and what they predict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conversion.models import edit_json

WEIGHTS = "model.safetensors"


def add_mtp_layers(folder: Path, count: int = 1, *, seed: int = 7) -> list[str]:
    """Give a folder of one file random MTP layers, by the names of its family; these names.

    The layer inside has the tensors of the last of the others.
    """
    tensors, config = load_file(folder / WEIGHTS), _config(folder)
    torch.manual_seed(seed)
    layers, of_qwen = config["num_hidden_layers"], config["model_type"].startswith("qwen")
    last = f"model.layers.{layers - 1}."
    h, dtype = config["hidden_size"], tensors["model.norm.weight"].dtype
    new: dict[str, Tensor] = {}
    for layer in range(count):
        inside = f"mtp.layers.{layer}." if of_qwen else f"model.layers.{layers + layer}."
        for name, tensor in tensors.items():
            if name.startswith(last):
                scale = 0.5 if tensor.dim() == 1 else 0.2
                random = scale * torch.randn(tensor.shape)
                new[inside + name.removeprefix(last)] = random.to(tensor.dtype)
        around = around_names(config, layer)
        for name in around[:2] + around[3:]:
            new[name] = torch.randn(h).to(dtype)
        new[around[2]] = (0.2 * torch.randn(h, 2 * h)).to(dtype)
        if not of_qwen:
            new[f"{inside}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
            new[f"{inside}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({**tensors, **new}, folder / WEIGHTS, metadata={"format": "pt"})
    key = "mtp_num_hidden_layers" if "5" in config["model_type"] else "num_nextn_predict_layers"
    if config["model_type"] == "deepseek_v3":
        key = "num_nextn_predict_layers"
    if config["model_type"] != "qwen3_next":
        # Qwen3-Next's published config.json says nothing of it.
        edit_json(folder / "config.json", **{key: count})
    return list(new)


def fuse_experts(folder: Path) -> None:
    """Store the experts of the MTP layer of Qwen in one tensor, as transformers has them."""
    tensors = load_file(folder / WEIGHTS)
    first = "mtp.layers.0.mlp.experts"
    count = sum(name.startswith(first) and "up_proj" in name for name in tensors)
    gate, up, down = (
        [tensors.pop(f"{first}.{expert}.{name}_proj.weight") for expert in range(count)]
        for name in ("gate", "up", "down")
    )
    tensors[f"{first}.gate_up_proj"] = torch.cat([torch.stack(gate), torch.stack(up)], dim=1)
    tensors[f"{first}.down_proj"] = torch.stack(down)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def around_names(config: dict[str, Any], layer: int) -> list[str]:
    """Of an MTP layer: norm of the embedding, norm of the hidden states, projection, last norm."""
    if config["model_type"].startswith("qwen"):
        first, names = "mtp.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm")
    else:
        first = f"model.layers.{config['num_hidden_layers'] + layer}."
        names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    return [f"{first}{name}.weight" for name in names]


@torch.no_grad()
def predicted_logits(folder: Path, work: Path, tokens: list[list[int]]) -> list[list[Tensor]]:
    """For each MTP layer and sequence: [length - layer - 2, vocabulary] logits in float64.

    Row i of the first layer predicts token i + 2. It is DeepSeek-V3's equation 21 in plain
    operations, with the halves as servers put them, the embedding's first; of transformers are the
    trunk and the layer inside, which it loads as one more layer of the model.
    """
    from transformers import AutoModelForCausalLM

    config, tensors = _config(folder), load_file(folder / WEIGHTS)
    layers, of_qwen = config["num_hidden_layers"], config["model_type"].startswith("qwen")
    count = sum(name.endswith(("eh_proj.weight", "mtp.fc.weight")) for name in tensors)
    longer = work / "longer"
    shutil.copytree(folder, longer)
    names = {name: name for name in tensors if not name.startswith("mtp.")}
    if of_qwen:
        inside = [name for name in tensors if name.startswith("mtp.layers.")]
        names |= {n: n.replace("mtp.layers.0.", f"model.layers.{layers}.") for n in inside}
    renamed = {new: tensors[name] for name, new in names.items()}
    save_file(renamed, longer / WEIGHTS, metadata={"format": "pt"})
    changes: dict[str, Any] = {"num_hidden_layers": layers + count}
    if "layer_types" in config:
        changes["layer_types"] = config["layer_types"] + ["full_attention"] * count
    edit_json(longer / "config.json", **changes)
    model = AutoModelForCausalLM.from_pretrained(
        longer,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    inner, further = model.model, model.model.layers[layers:]
    inner.layers, inner.config.num_hidden_layers = inner.layers[:layers], layers

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        scale = weight.double() + (1 if of_qwen else 0)
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * scale

    found: list[list[Tensor]] = [[] for _ in range(count)]
    for sequence in tokens:
        ids = torch.tensor([sequence])
        hidden = inner(ids, use_cache=False).last_hidden_state
        embedded = inner.embed_tokens(ids)
        for index, layer in enumerate(further):
            of_embedding, of_hidden, projection, last = (
                tensors[name] for name in around_names(config, index)
            )
            halves = norm(embedded[:, index + 1 :], of_embedding), norm(hidden[:, :-1], of_hidden)
            x = torch.cat(halves, dim=-1) @ projection.double().T
            positions = torch.arange(x.shape[1])[None]
            later = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
            x = layer(
                x,
                attention_mask=later[None, None],
                position_ids=positions,
                position_embeddings=inner.rotary_emb(x, positions),
            )
            hidden = norm(x[0] if isinstance(x, tuple) else x, last)
            found[index].append(model.lm_head(hidden)[0, :-1])
    return found


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
