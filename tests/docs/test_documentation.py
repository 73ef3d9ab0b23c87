# SPDX-License-Identifier: Apache-2.0
"""What README.md and the pages of docs/ show is true.

Code runs, tables and outputs are those of the code, and whatever is named exists.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.checkpoints import checkpoint
from tests.support.messages import saying
from tests.support.model_loading import loaded
from tests.support.repository import ROOT
from vllm.compressed_linear.checkpoint.shard import CheckpointError
from vllm.compressed_linear.formats import base, registry
from vllm.compressed_linear.integration.preparation import PROCESS_PLAN, detect_platform
from vllm.compressed_linear.prepare.plan import PlanEntry

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.stem for page in PAGES]
PACKAGE = ROOT / "vllm" / "compressed_linear"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _load_generator()


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks of one language."""
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


def spans(page: Path) -> list[str]:
    """Inline code of a page."""
    prose = FENCE.sub("", page.read_text())
    return re.findall(r"`([^`\n]+)`", prose)


def in_pages(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def clean_formats() -> Iterator[None]:
    """Formats that a page registers are forgotten again."""
    known = registry.formats()
    yield
    base._FORMATS.clear()
    base._FORMATS.update(known)


@pytest.mark.usefixtures("clean_registry", "clean_formats")
@pytest.mark.parametrize("page", in_pages("python"), ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page in order, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    # Classes are looked up by module when vLLM copies or pickles a configuration.
    module = ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match[1] == "python":
            # So that a traceback shows the line of the page.
            blank = "\n" * text.count("\n", 0, match.start(2))
            exec(compile(blank + match[2], str(page), "exec"), vars(module))


EVERYWHERE = (
    "command",
    "settings",
    "capabilities",
    "source",
    "benchmark",
    "folders",
    "gpu-order",
)
"""Generated parts that are the same on every machine."""
ON_THIS_CPU = ("message", "plan-file")
"""Parts that name the code path of the machine they were made on."""
STOCK = ("coverage",)
"""Parts for which vLLM is started without this package."""
MADE_ON = "cpu:avx512bf16"


def parts(page: Path) -> set[str]:
    return {match["call"].split()[0] for match in generate.PART.finditer(page.read_text())}


def check_parts(page: Path, names: tuple[str, ...]) -> None:
    text = page.read_text()
    made = generate.render(text, lambda name: name in names)
    assert generate.comparable(made) == generate.comparable(text), (
        f"{page.name} is not what the code says: run `python docs/generate.py`"
    )


def with_parts(names: tuple[str, ...]) -> list[Path]:
    return [page for page in PAGES if parts(page) & set(names)]


def test_every_part_is_checked() -> None:
    used = set().union(*map(parts, PAGES))
    assert used <= set(EVERYWHERE + ON_THIS_CPU + STOCK)
    assert set(generate.PARTS) == set(EVERYWHERE + ON_THIS_CPU + STOCK)


@pytest.mark.parametrize("page", with_parts(EVERYWHERE), ids=lambda page: page.stem)
def test_generated_parts_are_what_the_code_says(page: Path) -> None:
    check_parts(page, EVERYWHERE)


@pytest.mark.parametrize("name", generate.IMAGES)
def test_generated_images_are_what_the_code_says(name: str) -> None:
    made = generate.IMAGES[name]()
    assert made == (ROOT / name).read_text(), (
        f"{name} is out of date: run `python docs/generate.py`"
    )


def require_the_same_cpu() -> None:
    found = detect_platform()
    if found.name != MADE_ON:
        pytest.skip(f"made on {MADE_ON}, this is {found.name}")
    if "amx" in found.features:
        pytest.skip("made without AMX, with which vLLM takes other layers and other kernels")


@pytest.mark.parametrize("page", with_parts(ON_THIS_CPU), ids=lambda page: page.stem)
def test_quoted_errors_and_plans_are_what_loading_gives(page: Path) -> None:
    require_the_same_cpu()
    check_parts(page, ON_THIS_CPU)


@pytest.mark.e2e
@pytest.mark.parametrize("page", with_parts(STOCK), ids=lambda page: page.stem)
def test_stock_vllm_loads_what_the_table_says(page: Path) -> None:
    require_the_same_cpu()
    check_parts(page, STOCK)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        other = page.parent / file if file else page
        assert other.is_file(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as Markdown renderers make them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.replace("`", "").lower()).replace(" ", "-") for t in titles}


TOP = ("benchmarks", "csrc", "docs", "examples", "overlay", "scripts", "tests", "vllm")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    named = [s.rstrip("/") for s in spans(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", s)]
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    missing = [name for name in named if name.split("/")[0] in TOP and not (ROOT / name).exists()]
    # `spec/activation.py` is a path below the package.
    below = [name for name in named if name.split("/")[0] in folders]
    missing += [name for name in below if not (PACKAGE / name).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    shown = "\n".join([*spans(page), *blocks(page, "bash")])
    assert set(re.findall(r"\bmake ([a-z][\w-]*)", shown)) <= set(phony[1].split())


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_modules_and_their_members_that_are_named_exist(page: Path) -> None:
    words: dict[str, set[str]] = defaultdict(set)
    for path in PACKAGE.rglob("*.py"):
        words[path.stem] |= set(re.findall(r"\w+", path.read_text()))
    for span in spans(page):
        name = span.partition("(")[0].removeprefix("vllm.compressed_linear.")
        if not re.fullmatch(r"[a-z_]+(\.\w+)+", name) or name.split(".")[0] not in words:
            continue
        if name.endswith((".py", ".json", ".md")):
            continue
        # `weights.rows` may be a function of the module or a member of its objects.
        module, *members = name.split(".")
        assert set(members) <= words[module], f"{page.name} names {span}"


def test_variables_are_documented_and_exist() -> None:
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "csrc").rglob("*.cpp"), ROOT / "setup.py"]
    variable = re.compile(r"\b(?:VLLM_)?COMPRESSED_LINEAR(?:_[A-Z]+)*\b")
    internal = {
        "COMPRESSED_LINEAR_X86",
        "COMPRESSED_LINEAR_ARM",
        "COMPRESSED_LINEAR_OUTPUT_DIR",
    }
    known = set().union(*(variable.findall(path.read_text()) for path in sources)) - internal
    documented = set(variable.findall((ROOT / "docs" / "settings.md").read_text()))
    for_tests = {"COMPRESSED_LINEAR_ZOO"}
    assert documented - for_tests == known - {"COMPRESSED_LINEAR"}
    for page in PAGES:
        assert set(variable.findall(page.read_text())) <= documented


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_options_of_vllm_exist(page: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    for line in "\n".join(blocks(page, "bash")).splitlines():
        if "vllm serve MODEL" in line:
            arguments = shlex.split(line.partition("vllm serve MODEL")[2], comments=True)
            _, unknown = parser.parse_known_args(arguments)
            assert not unknown, line


def test_hf_overrides_replace_the_quantization_config(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("gptqmodel-gptq-w4-g128-sym"), path)
    config = json.loads((path / "config.json").read_text())
    right = dict(config["quantization_config"])
    config["quantization_config"]["group_size"] = 64
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=saying("group 64")), loaded(path):
        pass
    with loaded(path, hf_overrides={"quantization_config": right}):
        assert {entry.backend for entry in PROCESS_PLAN.entries.values()} == {"cpu"}


def test_fields_of_the_plan_are_all_explained() -> None:
    text = (ROOT / "docs" / "plan.md").read_text()
    names = {field.name for field in dataclasses.fields(PlanEntry)}
    names |= {"pid", "rank", "fingerprint", "reasons"}
    explained = set(re.findall(r"`(\w+)`", text.partition("| Field | Meaning |")[2]))
    assert names <= explained


def test_what_continuous_integration_runs_is_in_the_readme() -> None:
    ran = re.search(r"^exec (.+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert ran is not None
    assert ran[1] in (ROOT / "README.md").read_text()


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]
    named = set(re.findall(r"([\w-]+\.md)", navigation))
    assert named == {page.name for page in PAGES if page.parent.name == "docs"}
