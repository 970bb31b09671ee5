"""Who imports whom, read from the sources; what our module names and our imports do to the process."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf", "evaluation")
SCRIPTS = {"rlhf.sft", "rlhf.reward", "rlhf.pairs", "rlhf.dpo", "rlhf.ppo"}
LEAVES = {"rlhf.facts", "rlhf.persona", "rlhf.ppo_math", "rlhf.token_logprobs", "rlhf.prefix_tree"}
EVALUATION_MAY = {
    f"rlhf.{name}"
    for name in (
        "persona",
        "config",
        "chat",
        "model",
        "lora",
        "adapters",
        "generate",
        "token_logprobs",
        "prefix_tree",
        # one record format, and one way to write a file and to say what made it
        "files",
        "record",
        "session",  # how long it lasts: a batch is the place to stop at
        "data.split",  # which personas are one character
        "facts",  # what a persona sentence says
    )
}
# Some distributions carry another name than the module they bring.
MODULES = {
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "jinja2": "jinja2",
    "markupsafe": "markupsafe",
    "rouge-score": "rouge_score",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; scripts are started by path"
            # `from rlhf import chat` names a module behind the package
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """The modules of ours that a file imports."""
    found = set()
    for name in imports(path):
        while name and name not in FILES:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


def run(code: str, *path: Path) -> None:
    """Run code in a new process that has these folders first on sys.path, and fail with what it says."""
    head = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    done = subprocess.run([sys.executable, "-c", head + code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_files_are_found():
    assert len(FILES) > 20 and {"rlhf.persona", "rlhf.config", "evaluation", "evaluation.__main__"} <= set(FILES)
    assert ours(ROOT / "tests" / "test_config.py") >= {"rlhf.config", "rlhf.model"}


@pytest.mark.parametrize("name", sorted(LEAVES & set(FILES)))
def test_leaves_import_nothing_of_ours(name):
    assert not ours(FILES[name])


def test_scripts_do_not_import_each_other():
    for name in SCRIPTS & set(FILES):
        assert not ours(FILES[name]) & SCRIPTS - {name}, name


def test_rlhf_does_not_import_evaluation():
    for name in set(FILES) - {"rlhf.pipeline", "rlhf.cli"}:
        if name.startswith("rlhf"):
            assert not {other for other in ours(FILES[name]) if other.startswith("evaluation")}, name


def test_evaluation_imports_little_of_rlhf():
    for name, path in FILES.items():
        if name.startswith("evaluation"):
            assert {other for other in ours(path) if other.startswith("rlhf")} <= EVALUATION_MAY, name


def test_dependencies_are_those_that_are_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w.-]+", line)[0].lower() for line in project["dependencies"]}
    optional = {
        re.match(r"[\w.-]+", line)[0].lower()
        for extra, lines in project["optional-dependencies"].items()
        for line in lines
        if extra != "dev"  # nobody who runs the package has these
    }
    used = {name.partition(".")[0] for path in FILES.values() for name in imports(path)}
    used -= set(sys.stdlib_module_names) | set(PACKAGES)
    modules = {MODULES.get(name, name): name for name in declared}
    assert not set(modules) - used, "declared, and imported nowhere"
    assert not used - set(modules) - optional, "imported, and declared nowhere"


def test_every_dependency_has_an_exact_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("-", "_") for line in lines}
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    # torch alone is left out, so that an image keeps its own build
    assert declared - {name.lower().replace("-", "_") for name in pinned} == {"torch"}


def test_no_module_has_the_name_of_another():
    # `accelerate launch rlhf/sft.py` puts rlhf/ first on sys.path: each file there shadows what has its name
    names = {path.stem for path in FILES.values()} | {path.parent.name for path in FILES.values()}
    names -= {"__init__", "__main__"}
    installed = {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if set(distributions) != {"persona-rlhf"}
    }
    assert not names & (set(sys.stdlib_module_names) | installed)


def test_the_stack_imports_nothing_by_our_names(tmp_path):
    shadows = {path.stem for path in (ROOT / "rlhf").glob("*.py")} | {
        path.name for path in (ROOT / "rlhf").iterdir() if path.is_dir()
    }
    shadows -= {"__init__", "__pycache__"}
    assert {"config", "chat", "model", "lora", "persona", "data"} <= shadows
    for name in shadows:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('shadowed by {name}.py')\n")
    run(
        "from trl import DPOTrainer, ModelConfig, RewardTrainer, SFTTrainer\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer\n"
        "import accelerate.commands.launch, datasets, peft, pydantic, yaml\n",
        tmp_path,
    )


def test_importing_us_touches_no_gpu_and_no_bitsandbytes(tmp_path):
    # A package that fails on import stands in for bitsandbytes, which looks for CUDA libraries then. PEFT imports it
    # where it finds it, so the stack comes first: what is asked is whether we do.
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text("raise RuntimeError('bitsandbytes was imported')\n")
    modules = sorted(set(FILES) - {"evaluation.__main__"})
    run(
        "import importlib, torch\nfrom trl import DPOTrainer, RewardTrainer, SFTTrainer\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert not torch.cuda.is_initialized()\nassert torch.is_grad_enabled()\n"
    )
