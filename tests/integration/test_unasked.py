# SPDX-License-Identifier: Apache-2.0
"""Tables and heads that vLLM's class builds without asking for a quantization method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.edited import edited
from tests.support.messages import saying
from tests.support.model_loading import LoadedModel, loaded, logits
from tests.support.reloading import reload, worst_error
from tests.support.table_models import Bits, TableModel, write
from vllm.compressed_linear.formats.resolution import ConfigError
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN
from vllm.compressed_linear.integration.reload import ReloadRefusedError

pytestmark = pytest.mark.usefixtures("inspect_in_process")

BOTH: dict[str, Any] = {"table": Bits(8, 32), "head": Bits(6, 64)}
SERVED = {
    "gemma-tied": TableModel("gemma-tied", table=Bits(8, 32)),
    "falcon-tied": TableModel("falcon-kv-groups", table=Bits(4, 32)),
    "cohere-tied": TableModel("cohere-logit-scale", table=Bits(8, 32, symmetric=False)),
    "gptj": TableModel("gptj", tied=False, **BOTH),
    "nemotron": TableModel("nemotron", tied=False, **BOTH),
    "minicpm3": TableModel("minicpm3", tied=False, **BOTH),
}


def load(path: Path) -> Any:
    return loaded(path, skip_tokenizer_init=True)


@pytest.mark.parametrize("name", SERVED)
def test_they_are_served_quantized(name: str, tmp_path: Path) -> None:
    reference = write(SERVED[name], tmp_path / "model")
    with load(tmp_path / "model") as model:
        error = worst_error(logits(model, reference["input_ids"]), reference)
        assert error <= 1e-4
    assert PROCESS_PLAN.prepared == PROCESS_PLAN.expected
    names = {entry.name.rpartition(".")[2] for entry in PROCESS_PLAN.entries.values()}
    assert names & {"embed_tokens", "wte", "word_embeddings", "lm_head"}


def test_a_reload_gives_the_new_models_logits(tmp_path: Path) -> None:
    first = write(SERVED["gemma-tied"], tmp_path / "first")
    second = write(TableModel("gemma-tied", table=Bits(8, 32), seed=1), tmp_path / "second")
    with load(tmp_path / "first") as model:
        assert worst_error(logits(model, first["input_ids"]), first) <= 1e-4
        reload(model, tmp_path / "second")
        assert worst_error(logits(model, second["input_ids"]), second) <= 1e-4


def test_a_reload_of_what_vllm_would_keep_of_the_old_weights_is_refused(tmp_path: Path) -> None:
    """vLLM's class copies some tensors (sinks, in 0.33 experts) to where a reload does not look."""
    models = (TableModel("gpt-oss-sinks", tied=False, seed=seed, **BOTH) for seed in (0, 1))
    references = [write(model, tmp_path / str(i)) for i, model in enumerate(models)]
    with load(tmp_path / "0") as model:
        expected = saying("old weights", "model.layers.0", "GptOssForCausalLM", "restart")
        with pytest.raises(ReloadRefusedError, match=expected):
            reload(model, tmp_path / "1")
        rows = table_and_head(model)[0](torch.arange(512))
    torch.testing.assert_close(rows, references[0]["table"], rtol=1e-6, atol=0)


def table_and_head(model: LoadedModel) -> tuple[Any, Any]:
    return model.model.model.embedding, model.model.lm_head


def test_gpt_oss_whose_table_nobody_asks_for(tmp_path: Path) -> None:
    """vLLM's class for it gives neither the table nor the head a config, and skips what it does not
    know."""
    reference = write(TableModel("gpt-oss-sinks", tied=False, **BOTH), tmp_path / "model")
    with load(tmp_path / "model") as model:
        table, head = table_and_head(model)
        rows = table(torch.arange(512))
        torch.testing.assert_close(rows, reference["table"], rtol=1e-6, atol=0)
        x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
        ours = head.quant_method.apply(head, x)[:, :512]
    torch.testing.assert_close(ours, x @ reference["head"].t(), rtol=1e-4, atol=1e-5)


def test_layers_of_other_kinds_are_refused_by_name_before_loading(tmp_path: Path) -> None:
    """The positions of GPT-2 are a plain table of torch."""
    write(TableModel("gpt2-input-major", table=Bits(8, 32)), tmp_path / "model")
    codes = "transformer.wpe.weight_packed"
    with (
        pytest.raises(ConfigError, match=saying("transformer.wpe", codes, "Embedding")),
        load(tmp_path / "model"),
    ):
        pass


def test_codes_that_no_layer_has_a_name_for_are_said_with_what_is_missing(tmp_path: Path) -> None:
    write(TableModel("llama", tied=False, table=None, head=None), tmp_path / "model")
    path = edited(
        tmp_path / "model",
        tmp_path / "edited",
        drop=["model.norm.weight"],
        add={"model.norm.weights": torch.ones(128)},
    )
    with (
        pytest.raises(ValueError, match=saying("model.norm.weight", "model.norm.weights")),
        load(path),
    ):
        pass
