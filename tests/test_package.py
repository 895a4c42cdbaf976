"""The package as a whole: which module may import which, and what none may do."""

import ast
import dataclasses
import inspect
import operator
import pathlib

import pytest

import minillm_jax as mj

ROOT = pathlib.Path(mj.__file__).parent

# A module may import those of the rows above its own, and those that share its entry.
# The longest entry that names it, or a folder that it is in, counts: a new module needs
# a place here. An `__init__` only hands on names of its own folder.
LAYERS = (
    ("validation", "progress", "json_files"),
    ("rope_scaling", "compilation_cache"),
    ("config_rules",),
    ("config",),
    ("model.quantized",),
    ("model.products",),
    ("reference",),
    ("planning.costs", "model.rope", "model.layers", "model.cache"),
    ("model.cudnn", "model.scores"),
    ("model.blockwise",),
    ("model.attention",),
    ("model.transformer",),
    ("text.tokenizer", "decoding.sampler"),
    ("text.streaming", "decoding.sampling", "decoding.checks"),
    ("decoding.decode", "decoding.requests"),
    ("decoding.executables",),
    ("decoding.prompt_cache",),
    ("decoding.stream",),
    ("decoding.generator",),
    ("decoding.verify",),
    ("weights.errors", "weights.families"),
    ("weights.rope_parameters",),
    ("weights.windows",),
    ("weights.configs", "weights.names", "weights.files", "weights.hub"),
    ("weights",),
    ("training.errors",),
    ("training.near_duplicates", "training.sources"),
    ("training.corpus",),
    ("training.packing",),
    ("training.loss",),
    ("training.optimizer", "training.step"),
    ("training.evaluation",),
    ("planning.devices", "planning.automatic", "planning.activations"),
    ("planning.machine", "planning.workload", "planning.bounds"),
    ("planning.probes", "planning.doctor"),
    ("planning.compiled",),
    ("planning.memory",),
    ("planning.advice",),
    ("training.settings", "training.checkpoint", "training.metrics"),
    ("training.run_folder",),
    ("training.train",),
    ("cli",),
)
# The oracle and test help stand apart: they share no code with the model.
STANDS_APART = {"reference": ("config",), "testing": ("config", "reference")}


def modules():
    """Dotted names below the package, "" for the package, with their source."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = (path, ast.parse(path.read_text(), str(path)))
    return found


MODULES = modules()
FOLDERS = {name for name, (path, _) in MODULES.items() if path.name == "__init__.py"}


def imports(tree):
    """The package's own modules that a module imports, anywhere in it; dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minillm_jax":
                    yield alias.name.removeprefix("minillm_jax").lstrip(".")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module and node.module.split(".")[0] == "minillm_jax":
                folder = node.module.removeprefix("minillm_jax").lstrip(".")
                for alias in node.names:
                    inner = f"{folder}.{alias.name}".lstrip(".")
                    yield inner if inner in MODULES else folder


def inside(name, folder):
    return not folder or name == folder or name.startswith(folder + ".")


def place(name):
    """The entry that names a module, and its row."""
    entries = [
        (entry, row)
        for row, entries in enumerate(LAYERS)
        for entry in entries
        if inside(name, entry)
    ]
    assert entries, f"minillm_jax.{name} has no place in LAYERS, or may not be imported"
    return max(entries, key=lambda found: len(found[0]))


def misplaced(name, imported):
    """Whether module `name` may not import `imported`."""
    if name in FOLDERS:
        ours = inside(imported, name)
        return not ours or (inside(imported, "cli") and not inside(name, "cli"))
    if not imported:  # the public surface as a whole
        return not inside(name, "cli")
    if name in STANDS_APART:
        return imported not in STANDS_APART[name]
    (entry, row), (other, other_row) = place(name), place(imported)
    return not (other_row < row or other == entry)


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "minillm_jax")
def test_imports_point_one_way(name):
    _, tree = MODULES[name]
    wrong = {other for other in imports(tree) if misplaced(name, other)}
    assert not wrong


@pytest.mark.parametrize("name", sorted(set(MODULES) - FOLDERS - set(STANDS_APART)))
def test_every_module_has_a_place_in_the_layers(name):
    place(name)


def test_the_layers_name_modules_that_exist():
    names = [entry for entries in LAYERS for entry in entries]
    assert len(names) == len(set(names))
    assert set(names) | set(STANDS_APART) <= set(MODULES)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("config", "from minillm_jax.model import cache"),
        ("model.cache", "from minillm_jax.model.attention import attend"),
        ("model.layers", "import minillm_jax.model.rope"),
        ("model.transformer", "import minillm_jax as mj"),
        ("model.transformer", "from minillm_jax import decode_step"),
        ("decoding.decode", "def f():\n  from minillm_jax.cli import app"),
        ("planning.costs", "from minillm_jax.planning import memory"),
        ("testing", "from minillm_jax.model import layers"),
        ("testing", "import minillm_jax.validation"),
        ("planning.memory", "from minillm_jax import testing"),
        ("", "from minillm_jax.cli.app import main"),
        ("model", "from minillm_jax.decoding import decode"),
    ],
)
def test_an_import_against_the_layers_is_seen(name, line):
    def allowed(other):
        try:
            return not misplaced(name, other)
        except AssertionError:
            return False

    assert not all(allowed(other) for other in imports(ast.parse(line)))


# What no module does


FORBIDDEN_MODULES = (
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "jsonpickle"),
    *("marshal", "shelve", "runpy", "code", "codeop", "imp", "builtins", "importlib"),
)
ALLOWED_MODULES = ("importlib.metadata", "importlib.resources")  # these run nothing
FORBIDDEN_NAMES = ("eval", "exec", "compile", "__import__", "__builtins__")
FORBIDDEN_ATTRIBUTES = ("exec_module", "import_module", "run_path", "run_module")
FORBIDDEN_KEYWORDS = ("allow_pickle", "trust_remote_code")


def imported_modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def runs_code(node):
    """Whether a syntax node could run what a file or a string says."""
    for name in imported_modules(node):
        if any(inside(name, module) for module in FORBIDDEN_MODULES):
            return not any(inside(name, module) for module in ALLOWED_MODULES)
    if isinstance(node, ast.Name):
        return node.id in FORBIDDEN_NAMES
    if isinstance(node, ast.Attribute):
        return node.attr in FORBIDDEN_ATTRIBUTES
    if isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS:
        return not (isinstance(node.value, ast.Constant) and node.value.value is False)
    return False


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "minillm_jax")
def test_no_module_runs_code_from_data(name):
    path, tree = MODULES[name]
    lines = [node.lineno for node in ast.walk(tree) if runs_code(node)]
    assert not lines, f"{path}: lines {lines}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p, os",
        "from pickle import loads",
        "def f():\n  from dill import load",
        "import importlib.util",
        "from importlib import import_module",
        "import importlib",
        "eval(x)",
        "f = exec",
        "run = [compile]",
        "__import__('os')",
        "import builtins",
        "np.load(path, allow_pickle=True)",
        "load(path, trust_remote_code=flag)",
        "loader.exec_module(module)",
    ],
)
def test_code_that_runs_data_is_seen(source):
    assert any(map(runs_code, ast.walk(ast.parse(source))))


@pytest.mark.parametrize(
    "source",
    [
        "import importlib.metadata",
        "from importlib import resources",
        "step.lower(x).compile()",
        "re.compile('a')",
        "np.load(path, allow_pickle=False)",
        "import codecs, pickletools_like",
    ],
)
def test_code_that_runs_no_data_is_not(source):
    assert not any(map(runs_code, ast.walk(ast.parse(source))))


@pytest.mark.parametrize("name", [name for name in MODULES if not inside(name, "cli")])
def test_only_command_lines_read_flags(name):
    used = [x for node in ast.walk(MODULES[name][1]) for x in imported_modules(node)]
    assert not [x for x in used if inside(x, "absl") or inside(x, "ml_collections")]


# The public surface


PUBLIC = (
    *("ConfigError", "Configs", "ModelConfig", "CacheOverflowError", "CachePolicy"),
    *("MiniLLM", "create_model", "init_params", "init_cache", "grow_cache"),
    *("prefill", "decode_step", "Generator", "SamplingParams", "Completion", "Piece"),
)


def handed_on():
    """The names that `minillm_jax/__init__.py` hands on, `import X as X`."""
    _, tree = MODULES[""]
    nodes = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname for node in nodes for alias in node.names if alias.asname]


def test_the_public_surface_holds_what_the_design_promises():
    assert set(PUBLIC) <= set(handed_on())


@pytest.mark.parametrize("name", sorted({*PUBLIC, *handed_on()}))
def test_public_name_imports_and_is_documented(name):
    thing = getattr(mj, name)
    described = thing if inspect.isroutine(thing) else type(thing)
    described = thing if inspect.isclass(thing) else described
    doc = described.__doc__
    assert doc
    assert not doc.startswith(f"{name}("), "a dataclass's own, generated docstring"


@pytest.mark.parametrize("name", MODULES, ids=lambda name: name or "minillm_jax")
def test_every_module_says_what_it_is(name):
    _, tree = MODULES[name]
    assert ast.get_docstring(tree)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("create_model", "config"),
        ("init_params", "model seed"),
        ("init_cache", "config batch_size capacity policy"),
        ("prefill", "model params cache tokens lengths policy"),
        ("decode_step", "model params cache tokens policy"),
        ("grow_cache", "cache capacity config policy"),
        (
            "Generator",
            "model params tokenizer overflow num_sinks prompt_cache_bytes",
        ),
        ("Generator.generate", "self prompts max_new_tokens sampling"),
        ("Generator.stream", "self prompts max_new_tokens sampling session"),
        ("Generator.warmup", "self batch_sizes"),
        ("Generator.forbid_compile", "self"),
    ],
)
def test_public_function_takes_the_parameters_of_the_design(name, parameters):
    signature = inspect.signature(operator.attrgetter(name)(mj))
    assert list(signature.parameters) == parameters.split()
    if "policy" in signature.parameters:
        policy = signature.parameters["policy"]
        assert policy.kind is inspect.Parameter.KEYWORD_ONLY
        assert policy.default == mj.CachePolicy()


def test_defaults_of_generating_are_those_of_the_design():
    defaults = inspect.signature(mj.Generator).parameters
    assert defaults["tokenizer"].default is None
    assert defaults["overflow"].default == "stop"
    assert defaults["num_sinks"].default == 0
    for method in (mj.Generator.generate, mj.Generator.stream):
        defaults = inspect.signature(method).parameters
        assert defaults["max_new_tokens"].default == 64
        assert defaults["sampling"].default == mj.SamplingParams()
    assert dataclasses.asdict(mj.SamplingParams()) == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "logit_bias": None,
        "seed": 0,
        "stop": (),
        "stop_token_ids": (),
        "logprobs": None,
    }


@pytest.mark.parametrize(
    ("cls", "first"),
    [
        (mj.Completion, "tokens text finish_reason logprobs"),
        (mj.Piece, "index token text finish_reason"),
    ],
)
def test_results_begin_with_the_fields_of_the_design(cls, first):
    names = [field.name for field in dataclasses.fields(cls)]
    assert names[: len(first.split())] == first.split()


def test_public_errors_are_value_errors():
    assert issubclass(mj.ConfigError, ValueError)
    assert issubclass(mj.CacheOverflowError, ValueError)
    assert issubclass(mj.TokenizerError, ValueError)
