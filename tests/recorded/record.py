"""Asks AUTOMATIC1111's own code what it makes of prompts and of LoRAs, for the tests that compare ours with it.

    VENV/bin/python tests/recorded/record.py WEBUI        with the WebUI's Python; writes the files beside this one
    VENV/bin/python tests/recorded/record.py WEBUI -      answers lines of JSON, for fuzzing

Only its parser, its text encoders' tokenizing and its LoRA modules are loaded; what they import besides is made up.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

HERE = Path(__file__).resolve().parent
VOCABULARY = HERE.parents[1] / "accdiff_lib" / "embedded" / "tokenizer"

#: Prompts and numbers of steps as the WebUI counts them.
EDITED = [(prompt, steps) for steps in (1, 4, 20) for prompt in (
    "a cat", "", "a [red:blue:0.5] ball", "a [red:0.5] ball", "a [red::0.5] ball", "[:b:3][::3][:3]", "a [b: 2 ] c",
    "[a:b:.29][a:b:+0.7][a:b:-1][a:b:0][a:b:1.][a:b:1e1][a:b:100]", "[a|b]", "[fe|||]male", "[|]x",
    "[[a|b]:c:3]", "[a:[b:[c|d]:3]:1] e", "[(a:1.2) [b]:(c):0.5]", "((a) [b:c:2]", "[a|(b:1.1)]", "[x\\]:y\\:z:2]",
    "\\[x:y:2]", "a | b [c:d:2]", "[a|b:2]", "[a:b|c]", "[a:b:c:2]", "x[(y:2)] [z:2]", "foo [a:b:2]\\", "[a:\n b:2\n]",
    "a AND b", "a :0.5 AND [b:c:2] AND d : -1.5", "score: 9", "[a AND b:c:2]", " AND ", "aAND b AND", "a:1.5 :2 ",
    "naïve [日本:猫:0.5]", "(a, b:1.2), [c|d|e] BREAK [f:g:0.25]")]

#: Prompts, and embeddings with their numbers of vectors.
WRITTEN: list[tuple[str, dict[str, int]]] = [(prompt, {}) for prompt in (
    "", "a cat", "a (red:1.3) [dim] ((ball))", "a BREAK b BREAK", "BREAK BREAK", "(a BREAK b:1.2)",
    "(x:-1) BREAK (y:-1)", "it\u2019s \u201cnaïve\u201d 日本 \ufb01ne", "cat " * 76,
    "a, " * 30 + " ".join("bcdefghijklmnopqrstuvwxyz"), "cat " * 70 + ", dog " * 9, "a), b " * 40, "(un (closed [x",
    r"\(a\) b\c", ":) :1.2)")]
WRITTEN += [(prompt, {"my emb": 3, "My": 1, "EasyNegative": 8, "bad-hands-5": 4, "v(2)": 2}) for prompt in (
    "a my emb, easynegative", "MY EMBLEM my", "(easynegative:0.8) BREAK bad-hands-5, my emb", r"v\(2\) v(2)",
    "cat " * 70 + "easynegative dog", "a, b, easynegative " * 12, "uneasynegative my-emb")]


def prompt_parser(webui: Path) -> Any:
    """The WebUI's module."""
    sys.path.insert(0, str(webui / "modules"))
    import prompt_parser

    return prompt_parser


def edited(parser: Any, prompt: str, steps: int) -> list[list[list[Any]]]:
    """What the sampler sees at each call: the texts of a prompt's parts, with their weights."""
    texts: list[str] = []

    def encode(batch: list[str]) -> torch.Tensor:
        texts.extend(batch)
        return torch.arange(len(texts) - len(batch), len(texts)).reshape(-1, 1, 1)

    model = SimpleNamespace(get_learned_conditioning=encode)
    found = parser.get_multicond_learned_conditioning(model, parser.SdConditioning([prompt]), steps)
    calls = []
    for call in range(steps):
        parts, states = parser.reconstruct_multicond_batch(found, call)
        calls.append([[texts[int(states[number])], weight] for number, weight in parts[0]])
    return calls


class Made:
    """What stands for the WebUI's modules."""

    def __init__(self, webui: Path) -> None:
        package = ModuleType("modules")
        package.__path__ = [str(webui / "modules")]
        sys.modules["modules"] = package
        for name in ("devices", "sd_hijack", "shared", "sd_models", "cache", "errors", "hashes", "models", "models.sd3",
                     "models.sd3.mmdit"):
            module = ModuleType(f"modules.{name}")
            module.__path__ = []
            sys.modules[module.__name__] = module
            setattr(sys.modules[module.__name__.rpartition(".")[0]], name.rpartition(".")[2], module)
        of: Any = sys.modules
        of["modules.shared"].opts = SimpleNamespace(emphasis="Original", comma_padding_backtrack=20)
        of["modules.devices"].cpu, of["modules.devices"].dtype = torch.device("cpu"), torch.float32
        of["modules.models.sd3.mmdit"].QkvLinear = type("QkvLinear", (), {})
        of["modules.sd_hijack"].model_hijack = SimpleNamespace(embedding_db=self)
        self.embeddings: list[tuple[list[int], Any]] = []

    def find_embedding_at_position(self, tokens: list[int], place: int) -> tuple[Any, int | None]:
        """As the WebUI's table of embeddings does it."""
        for name, embedding in sorted(self.embeddings, key=lambda each: len(each[0]), reverse=True):
            if tokens[place:place + len(name)] == name:
                return embedding, len(name)
        return None, None


def tokenizer(made: Made) -> Any:
    """The WebUI's tokenizing of a line, with the vocabulary of all its models."""
    from modules.sd_hijack_clip import TextConditionalModel

    words = CLIPTokenizer(str(VOCABULARY / "vocab.json"), str(VOCABULARY / "merges.txt"))
    model = TextConditionalModel()
    model.tokenize = lambda texts: words(texts, truncation=False, add_special_tokens=False)["input_ids"]
    model.comma_token = words.get_vocab()[",</w>"]
    model.id_start, model.id_end = words.bos_token_id, words.eos_token_id
    return model


def written(made: Made, model: Any, prompt: str, embeddings: dict[str, int]) -> list[dict[str, Any]]:
    """The contexts of a prompt without BOS, EOS and padding: tokens and weights, and where embeddings begin."""
    made.embeddings = [(model.tokenize([name])[0], SimpleNamespace(name=name, vectors=vectors))
                       for name, vectors in embeddings.items()]
    contexts = []
    for chunk in model.tokenize_line(prompt)[0]:
        length = next((number for number, token in enumerate(chunk.tokens[1:]) if token == model.id_end))
        contexts.append({"tokens": chunk.tokens[1:1 + length], "weights": chunk.multipliers[1:1 + length],
                         "embeddings": [[fix.offset, fix.embedding.name] for fix in chunk.fixes]})
    return contexts


def differences(webui: Path, cases: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What LoRAs of weight 1 add to weights."""
    sys.path.insert(0, str(webui / "extensions-builtin" / "Lora"))
    import network
    import network_full
    import network_hada
    import network_lokr
    import network_lora

    network.modules = sys.modules["modules"]
    kinds = [network_lora.ModuleTypeLora(), network_hada.ModuleTypeHada(), network_lokr.ModuleTypeLokr(),
             network_full.ModuleTypeFull()]
    result = {}
    for name, tensors in cases.items():
        weight = tensors.pop("weight")
        layer: Any = torch.nn.Linear(weight.shape[1], weight.shape[0])
        if weight.ndim == 4:
            layer = torch.nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2)
        layer.weight.data.copy_(weight)
        of = SimpleNamespace(te_multiplier=1.0, unet_multiplier=1.0, dyn_dim=None)
        weights = network.NetworkWeights(network_key=name, sd_key="diffusion_model", w=tensors, sd_module=layer)
        found = next(made for made in (kind.create_module(of, weights) for kind in kinds) if made is not None)
        result[name] = found.calc_updown(weight)[0].detach().reshape(weight.shape).contiguous()
    return result


def loras() -> dict[str, dict[str, torch.Tensor]]:
    """A layer's weight and a LoRA's tensors for it, of every kind."""
    draw = torch.Generator().manual_seed(0)

    def r(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    line, conv, alpha = (8, 6), (8, 6, 3, 3), {"alpha": torch.tensor(3.0)}
    low = {"lora_up.weight": r(8, 2), "lora_down.weight": r(2, 6)}
    con = {"lora_up.weight": r(8, 2, 1, 1), "lora_down.weight": r(2, 6, 3, 3)}
    one = {"lora_up.weight": r(8, 2, 1, 1), "lora_down.weight": r(2, 6, 1, 1)}
    return {
        "lora": {"weight": r(*line), **low, **alpha},
        "lora without alpha": {"weight": r(*line), **low},
        "lora with scale": {"weight": r(*line), **low, **alpha, "scale": torch.tensor(0.3)},
        "lora of peft": {"weight": r(*line), "lora_A.weight": r(2, 6), "lora_B.weight": r(8, 2)},
        "locon": {"weight": r(*conv), **con, **alpha},
        "locon with a core": {"weight": r(*conv), **one, "lora_mid.weight": r(2, 2, 3, 3), **alpha},
        "lora of 1x1": {"weight": r(*line, 1, 1), **low, **alpha},
        "locon of a linear layer": {"weight": r(*line), **one, **alpha},
        "loha": {"weight": r(*line), "hada_w1_a": r(8, 2), "hada_w1_b": r(2, 6), "hada_w2_a": r(8, 2),
                 "hada_w2_b": r(2, 6), **alpha},
        "loha of a convolution": {"weight": r(*conv), "hada_w1_a": r(8, 2), "hada_w1_b": r(2, 54),
                                  "hada_w2_a": r(8, 2), "hada_w2_b": r(2, 54), **alpha},
        "loha with cores": {"weight": r(*conv), "hada_w1_a": r(2, 8), "hada_w1_b": r(2, 6), "hada_t1": r(2, 2, 3, 3),
                            "hada_w2_a": r(2, 8), "hada_w2_b": r(2, 6), "hada_t2": r(2, 2, 3, 3), **alpha},
        "lokr": {"weight": r(*line), "lokr_w1": r(2, 3), "lokr_w2": r(4, 2), **alpha},
        "lokr of low rank": {"weight": r(*line), "lokr_w1_a": r(2, 1), "lokr_w1_b": r(1, 3), "lokr_w2_a": r(4, 2),
                             "lokr_w2_b": r(2, 2), **alpha},
        "lokr of a convolution": {"weight": r(*conv), "lokr_w1": r(2, 3), "lokr_w2": r(4, 2, 3, 3), **alpha},
        "lokr with a core": {"weight": r(*conv), "lokr_w1": r(2, 3), "lokr_w2_a": r(2, 4), "lokr_w2_b": r(2, 2),
                             "lokr_t2": r(2, 2, 3, 3), **alpha},
        "whole difference": {"weight": r(*conv), "diff": r(*conv)},
        "dora": {"weight": r(*line), **low, **alpha, "dora_scale": r(1, 6).abs()},
        "dora of a convolution": {"weight": r(*conv), **con, **alpha, "dora_scale": r(1, 6, 1, 1).abs()},
    }


def main() -> None:
    webui = Path(sys.argv[1])
    parser, made = prompt_parser(webui), Made(webui)
    model = tokenizer(made)
    if sys.argv[2:] == ["-"]:
        for line in sys.stdin:
            prompt, asked = json.loads(line)
            answer = edited(parser, prompt, asked) if isinstance(asked, int) else written(made, model, prompt, asked)
            print(json.dumps(answer), flush=True)
        return
    table = {"edited": [[prompt, steps, edited(parser, prompt, steps)] for prompt, steps in EDITED],
             "written": [[prompt, embeddings, written(made, model, prompt, embeddings)]
                         for prompt, embeddings in WRITTEN]}
    (HERE / "prompts.json").write_text(json.dumps(table, ensure_ascii=False, separators=(",", ":")).replace(
        "]],[", "]],\n["), encoding="utf-8")
    cases = loras()
    tensors = {f"{name}|{part}": tensor.clone() for name, case in cases.items() for part, tensor in case.items()}
    tensors |= {f"{name}|difference": tensor for name, tensor in differences(webui, cases).items()}
    save_file(tensors, HERE / "loras.safetensors")
    assert load_file(HERE / "loras.safetensors")


if __name__ == "__main__":
    main()
