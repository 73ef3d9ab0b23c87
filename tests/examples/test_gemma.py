# SPDX-License-Identifier: Apache-2.0
"""The parts of the demo that need neither the model nor a real server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from gguf import TokenType
from rich.console import Console
from transformers import AutoTokenizer

import demo
import plan
import server
from tests.support.messages import saying
from tokenizer import merges_of, write_tokenizer


def test_merges_follow_the_scores_of_what_they_make() -> None:
    pieces = ["a", "b", "c", "ab", "bc", "abc"]
    scores = [-9.0, -9.0, -9.0, -1.0, -0.5, -2.0]
    assert merges_of(pieces, scores) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def test_tokenizer_is_readable_by_transformers(tmp_path: Path) -> None:
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    words = ["\N{LOWER ONE EIGHTH BLOCK}", *"abc", "\N{LOWER ONE EIGHTH BLOCK}a", "bc"]
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    pieces = [*control, "\n\n", *bytes_, *words]
    types = [
        *[TokenType.CONTROL] * len(control),
        TokenType.USER_DEFINED,
        *[TokenType.BYTE] * len(bytes_),
        *[TokenType.NORMAL] * len(words),
    ]
    write_tokenizer(tmp_path, pieces, [-float(i) for i in range(len(pieces))], types)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)

    ids = tokenizer("bc a\n\né")["input_ids"]
    e_acute = [f"<0x{byte:02X}>" for byte in "é".encode()]
    assert [pieces[i] for i in ids] == ["<bos>", "bc", words[4], "\n\n", *e_acute]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "bc a\n\né"


def test_plan_sums_like_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def layer(name: str, backend: str, size: int) -> dict[str, object]:
        sizes = {"bytes_checkpoint": size, "bytes_prepared": 2 * size, "prepare_seconds": 0.5}
        return {"name": name, "kind": "linear", "backend": backend, "variant": "fast", **sizes}

    layers = [
        layer("model.layers.0.mlp.down_proj", "cpu", 1_000_000),
        layer("model.layers.1.mlp.down_proj", "cpu", 3_000_000),
        {"name": "model.layers.0.self_attn.attn", "kind": "Attention", "backend": "vllm"},
    ]
    written = tmp_path / "plan.json"
    written.write_text(json.dumps({"layers": layers}))
    plan.show(plan.read(written), Console(width=100))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["down_proj", "cpu", "(fast)", "2", "4.00", "MB", "8.00", "MB", "1000.0", "ms"] in lines
    assert ["all", "2", "4.00", "MB", "8.00", "MB", "1000.0", "ms"] in lines


def test_plan_names_the_processor_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rejected = [
        {"backend": "slower", "reasons": []},
        {"backend": "gpu_only", "reasons": ["device cpu (supported: cuda)", "3 bits"]},
    ]

    def layer(name: str, chosen_by: str) -> dict[str, object]:
        return {
            "name": name,
            "kind": "linear",
            "backend": "cpu",
            "variant": "avx2",
            "chosen_by": chosen_by,
            "rejected": rejected,
        }

    layers = [
        layer("model.layers.0.mlp.down_proj", "cost model"),
        layer("model.layers.0.mlp.gate_up_proj", "cost model"),
        layer("lm_head", "asked for"),
        {"name": "experts", "kind": "Experts", "backend": "vllm", "note": "not a linear layer"},
    ]
    machine = {"processor": "A Processor, model 1", "platform": "cpu:avx2", "threads": 2}
    written = tmp_path / "plan.json"
    written.write_text(json.dumps({"layers": layers, "machine": machine}))

    plan.show(plan.read(written), Console(width=200))
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "Processor: A Processor, model 1 (cpu:avx2, 2 threads)"
    fastest = "cpu (avx2) is the fastest by estimate for this processor (others that can: slower)"
    unable = "gpu_only cannot run it: device cpu (supported: cuda) ..."
    assert lines[lines.index("Why:") + 1 :] == [
        f"down_proj, gate_up_proj: {fastest}",
        f"down_proj, gate_up_proj, lm_head: {unable}",
        "lm_head: cpu (avx2) is the one that was asked for (others that can: slower)",
        "experts: vllm: not a linear layer",
    ]


def test_a_plan_without_layers_is_an_error(tmp_path: Path) -> None:
    written = tmp_path / "plan.json"
    written.write_text('{"layers": []}')
    with pytest.raises(ValueError, match=saying("plan.json")):
        plan.read(written)


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "vllm"
    command.write_text(f"#!{sys.executable}\nraise KeyError('no such model')\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with (
        pytest.raises(RuntimeError, match=r"ended with 1.*\n.*KeyError: 'no such model'"),
        server.serving(tmp_path, "model", tmp_path / "log", {}),
    ):
        pytest.fail("the server is not up")


def test_an_interrupted_step_is_made_again(tmp_path: Path) -> None:
    target = tmp_path / "checkpoint"

    def breaks(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        demo.make(target, breaks)
    assert not target.exists()
    demo.make(target, lambda directory: (directory / "whole").touch())
    demo.make(target, breaks)  # it is there: nothing is done
    assert [path.name for path in target.iterdir()] == ["whole"]
