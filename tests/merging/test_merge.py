"""Merges to disk: recipes, several processes, kills, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from weightops import open_checkpoint
from weightops.cli.main import run
from weightops.errors import OptionError, OutputError, RecipeError, UnknownNameError
from weightops.merging.merge import merge
from weightops.merging.recipe import Recipe


@pytest.fixture
def family(tmp_path: Path) -> tuple[str, list[str]]:
    """A base and three kin, as files."""
    generator = torch.Generator().manual_seed(0)
    names = {
        "embed.weight": (50, 8),
        **{f"layers.{i}.{n}.weight": (8, 8) for i in range(3) for n in ("mlp", "attn")},
        "norm.weight": (8,),
    }
    base = {n: torch.randn(s, generator=generator) for n, s in names.items()}
    paths = []
    for i in range(4):
        state = {
            n: t + (0.1 * torch.randn(t.shape, generator=generator) if i else 0)
            for n, t in base.items()
        }
        paths.append(
            str(
                open_checkpoint(state).save(
                    tmp_path / f"{'base' if not i else f'm{i}'}.safetensors"
                )
            )
        )
    return paths[0], paths[1:]


def equal(a: Path, b: Path) -> bool:
    x, y = open_checkpoint(a), open_checkpoint(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


# ------------------------------------------------------------------------ recipes


def test_a_recipe_is_what_it_prints(
    family: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, models = family
    line = [
        "merge",
        *models,
        "--method",
        "dare_ties",
        "--base",
        base,
        "--density",
        "0.4",
        "--weights",
        "1,2,3",
        "--alpha",
        "0.2,0.6",
        "--seed",
        "5",
    ]
    assert run([*line, "--print-recipe"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "r.yaml").write_text(text)
    assert Recipe.read(tmp_path / "r.yaml").to_yaml() == text
    assert run([*line, "-o", str(tmp_path / "a")]) == 0
    assert run(["merge", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    saved = open_checkpoint(tmp_path / "a")
    assert yaml.safe_dump(saved.source.made_from["recipe"], sort_keys=False) == text
    assert text.strip() in (tmp_path / "a/README.md").read_text()
    capsys.readouterr()
    assert run(["inspect", str(tmp_path / "a")]) == 0
    assert "dare_ties" in capsys.readouterr().out


def test_settings_in_a_recipe(family: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = family
    content = {
        "method": "ties",
        "base": base,
        "models": [models[0], {"model": models[1], "weight": {"*.mlp.*": 2, "*": 1}}],
        "alpha": {"layers.*": [0.1, 0.5], "*": 0.3},
        "options": {"density": {"each": [0.5, {"embed.*": 1.0, "*": 0.2}]}, "normalize": "count"},
        "dtype": "bfloat16",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    recipe = Recipe.read(tmp_path / "r.yaml")
    assert Recipe.of(recipe.to_dict()) == recipe
    merged = recipe.merge()
    assert merged["norm.weight"].dtype == torch.bfloat16
    only = merge(
        models[:2], "ties", base=base, weights=[1, 2], alpha=0.3, density=0.2, normalize="count"
    )
    assert not torch.equal(merged["layers.1.mlp.weight"], only["layers.1.mlp.weight"].bfloat16())


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        (
            "method: ties\nmodel: [a]",
            UnknownNameError,
            "no recipe key 'model'; did you mean models",
        ),
        ("models: []", RecipeError, "needs models"),
        ("models: [{model: a, wieght: 1}]", UnknownNameError, "did you mean weight"),
        ("models: [a]\nalpha: many", RecipeError, "alpha is a number"),
        ("models: [a]\nalpha: .nan", RecipeError, "alpha is a number"),
        ("models: [a]\nmethod: tis", UnknownNameError, "did you mean ties"),
        (
            "models: [a]\nmethod: ties\noptions: {densty: 1}",
            UnknownNameError,
            "did you mean density",
        ),
        ("models: [a]\ndtype: int8", UnknownNameError, "no dtype to write 'int8'"),
        ("- a", RecipeError, "not a recipe"),
        ("a: [", RecipeError, "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", RecipeError, "not valid YAML"),
    ],
)
def test_refused_recipes(text: str, error: type[Exception], match: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(error, match=match):
        Recipe.read(tmp_path / "r.yaml")


# ----------------------------------------------------------------------- mergekit


def mergekit(tmp_path: Path, content: dict[str, object]) -> Recipe:
    (tmp_path / "mk.yaml").write_text(yaml.safe_dump(content))
    return Recipe.read(tmp_path / "mk.yaml")


def test_mergekits_recipes(family: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = family
    entries = [
        {"model": m, "parameters": {"density": d, "weight": w}}
        for m, d, w in zip(models, (0.5, 0.3, 0.3), (1, 2, 0.5), strict=True)
    ]
    recipe = mergekit(
        tmp_path,
        {
            "merge_method": "ties",
            "base_model": base,
            "models": [{"model": base}, *entries],
            "dtype": "float32",
            "parameters": {"normalize": False, "int8_mask": True, "lambda": 0.7},
        },
    )
    assert recipe.to_dict() == {
        "method": "ties",
        "base": base,
        "models": [
            models[0],
            {"model": models[1], "weight": 2.0},
            {"model": models[2], "weight": 0.5},
        ],
        "alpha": 0.7,
        "options": {"density": {"each": [0.5, 0.3, 0.3]}, "normalize": "none"},
        "dtype": "float32",
    }
    recipe = mergekit(
        tmp_path,
        {
            "merge_method": "slerp",
            "base_model": base,
            "slices": [
                {
                    "sources": [
                        {"model": base, "layer_range": [0, 3]},
                        {"model": models[0], "layer_range": [0, 3]},
                    ]
                }
            ],
            "parameters": {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]},
        },
    )
    assert recipe.models == (base, models[0])
    merged = recipe.merge()
    one, two = open_checkpoint(base), open_checkpoint(models[0])
    assert torch.allclose(merged["layers.0.mlp.weight"], one["layers.0.mlp.weight"])
    assert torch.allclose(merged["layers.2.mlp.weight"], two["layers.2.mlp.weight"])
    plain = merge([base, models[0]], "slerp", t=0.5)
    assert torch.equal(merged["layers.2.attn.weight"], plain["layers.2.attn.weight"])
    assert torch.equal(merged["embed.weight"], plain["embed.weight"])


def test_layers_of_two_models_on_top_of_each_other(
    family: tuple[str, list[str]], tmp_path: Path
) -> None:
    base, models = family
    folders = []
    for i, path in enumerate((base, *models[:2])):
        folder = tmp_path / f"f{i}"
        open_checkpoint(path).save(folder)
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "model_type": "x"}))
        folders.append(str(folder))
    a, b, c = folders
    content: dict[str, object] = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [
            {"sources": [{"model": a, "layer_range": [0, 2]}]},
            {"sources": [{"model": b, "layer_range": [1, 3]}]},
        ],
    }
    recipe = mergekit(tmp_path, content)
    assert Recipe.of(recipe.to_dict()) == recipe
    recipe.merge().save(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 4
    out, one, two = open_checkpoint(tmp_path / "out"), open_checkpoint(a), open_checkpoint(b)
    assert len(out) == len(one) + 2
    came = {
        "embed.weight": (one, "embed.weight"),
        "norm.weight": (two, "norm.weight"),
        "layers.1.mlp.weight": (one, "layers.1.mlp.weight"),
    }
    came["layers.3.attn.weight"] = (two, "layers.2.attn.weight")
    for name, (source, old) in came.items():
        assert torch.equal(out[name], source[old]), name
    sources = [
        [{"model": m, "layer_range": span, "parameters": {"weight": 0.5}} for m in (b, c)]
        for span in ([0, 1], [1, 3])
    ]
    mixed = mergekit(
        tmp_path,
        {
            "merge_method": "task_arithmetic",
            "base_model": a,
            "slices": [{"sources": s} for s in sources],
        },
    ).merge()
    plain = merge([b, c], "task_arithmetic", base=a, weights=[0.5, 0.5])
    assert all(torch.equal(mixed[name], plain[name]) for name in plain)
    content["slices"] = [
        {"sources": [{"model": a, "layer_range": [0, 2]}]},
        {"sources": [{"model": b, "layer_range": [2, 5]}]},
    ]
    with pytest.raises(RecipeError, match="has no layer 3, 4"):
        mergekit(tmp_path, content).merge()
    with pytest.raises(RecipeError, match="equally many"):
        Recipe.of(
            {
                "slices": [
                    {"models": [{"model": a, "layers": [0, 1]}, {"model": b, "layers": [0, 2]}]}
                ]
            }
        )


def test_mergekits_scopes_and_slices(family: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = family
    entries = [
        {
            "model": models[0],
            "parameters": {"weight": 1.0, "density": [{"filter": "mlp", "value": 0.5}]},
        },
        {"model": models[1], "parameters": {"weight": [{"filter": "mlp", "value": 0.5}]}},
    ]
    content: dict[str, object] = {"merge_method": "ties", "base_model": base, "models": entries}
    with pytest.raises(RecipeError, match=r"m2.safetensors has no weight, which ties needs"):
        mergekit(tmp_path, content)
    content["parameters"] = {
        "density": 0.3,
        "weight": 0.2,
        "lambda": [{"filter": "attn", "value": 2.0}],
    }
    recipe = mergekit(tmp_path, content)
    assert [*recipe.options["density"]] == [{"*mlp*": 0.5, "*": 0.3}, 0.3]
    assert recipe.weights == (1.0, {"*mlp*": 0.5, "*": 0.2})
    assert recipe.alpha == {"*attn*": 2.0, "*": 1.0}
    sources = [
        {"model": m, "layer_range": [0, 2], "parameters": {"weight": 0.5}} for m in models[:2]
    ]
    few = mergekit(tmp_path, {"merge_method": "linear", "slices": [{"sources": sources}]}).merge()
    assert [name for name in few if "layers.2" in name] == []
    assert len(few) == len(open_checkpoint(base)) - 2
    with pytest.raises(RecipeError, match="layers are of a slice"):
        Recipe.of({"models": [{"model": models[0], "layers": [0, 2]}]})
    with pytest.raises(RecipeError, match="dtype is for the whole recipe"):
        Recipe.of(
            {"slices": [{"models": [{"model": models[0], "layers": [0, 2]}], "dtype": "float16"}]}
        )


def test_dtypes_are_brought_together_where_one_is_asked_for(
    family: tuple[str, list[str]], tmp_path: Path
) -> None:
    base, [one, two, _] = family
    half = str(open_checkpoint(one).save(tmp_path / "half.safetensors", dtype=torch.float16))
    merged = Recipe(
        (half, two), "ties", base=base, options={"density": 0.5}, dtype="bfloat16"
    ).merge()
    widened = merge(
        [open_checkpoint(half).to(torch.float32), two], "ties", base=base, density=0.5
    ).to(torch.bfloat16)
    assert all(torch.equal(merged[name], widened[name]) for name in widened)


def test_what_a_configuration_says_of_each_layer_is_stacked(
    family: tuple[str, list[str]], tmp_path: Path
) -> None:
    folders = []
    for i, path in enumerate(family[1][:2]):
        folder = open_checkpoint(path).save(tmp_path / f"f{i}")
        kinds = [f"{'ab'[i]}{layer}" for layer in range(3)]
        (folder / "config.json").write_text(
            json.dumps({"n_layer": 3, "model_type": "x", "layer_types": kinds})
        )
        folders.append(str(folder))
    spans = zip(folders, ([0, 2], [1, 3]), strict=True)
    pieces = [
        {"method": "passthrough", "models": [{"model": folder, "layers": span}]}
        for folder, span in spans
    ]
    Recipe.of({"slices": pieces}).merge().save(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"n_layer": 4, "model_type": "x", "layer_types": ["a0", "a1", "b1", "b2"]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"merge_method": "arcee_fusion"},
            "no merge method of mergekit's that is supported 'arcee_fusion'",
        ),
        ({"tokenizer_source": "union"}, "tokenizer_source: union is not supported"),
        ({"chat_template": "auto"}, "no key of mergekit's that is supported 'chat_template'"),
        ({"parameters": {"densty": 0.5}}, "parameters has 'densty', which ties doesn't take there"),
        ({"models": [{"model": "a"}]}, "a has no weight, which ties needs"),
        ({"base_model": None}, "ties needs base_model"),
        ({"slices": []}, "exactly one of models and slices"),
    ],
)
def test_mergekits_recipes_that_are_refused(
    change: dict[str, object], match: str, tmp_path: Path
) -> None:
    content = {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "a", "parameters": {"weight": 1}}],
    }
    merged = {key: value for key, value in (content | change).items() if value is not None}
    with pytest.raises((RecipeError, UnknownNameError), match=match):
        mergekit(tmp_path, merged)


# ------------------------------------------------------------- plans and the disk


def test_a_dry_run_tells_what_is_written(
    family: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, models = family
    line = [
        "merge",
        *models,
        "--method",
        "ties",
        "--base",
        base,
        "-o",
        str(tmp_path / "out"),
        "--max-shard-size",
        "1KB",
    ]
    assert run([*line, "--dry-run", "--json"]) == 0
    takes = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "out").exists()
    assert run(line) == 0
    written = list((tmp_path / "out").glob("*.safetensors"))
    assert (takes["files"], takes["tensors"]) == (len(written), 8)
    assert takes["bytes_written"] == sum(file.stat().st_size for file in written)
    assert takes["bytes_read"] == 4 * sum(t.numel() * 4 for t in open_checkpoint(base).values())


def test_nothing_stale_is_left_by_overwriting(
    family: tuple[str, list[str]], tmp_path: Path
) -> None:
    _, models = family
    merged, out = merge(models), tmp_path / "out"
    merged.save(out, max_shard_size=1000)
    assert len(list(out.glob("*.safetensors"))) > 2
    with pytest.raises(OutputError, match=r"exists\nhint: overwrite=True replaces it"):
        merged.save(out)
    merged.save(out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]
    with pytest.raises(OptionError, match="give a folder"):
        merged.save(tmp_path / "x.safetensors", max_shard_size=10)


def test_another_job_is_not_gone_on_with(family: tuple[str, list[str]], tmp_path: Path) -> None:
    _, models = family
    (tmp_path / ".out.part").mkdir()
    (tmp_path / ".out.part/journal.0").write_text("another\n")
    with pytest.raises(OutputError, match="holds what another job left"):
        merge(models).save(tmp_path / "out", resume=True)
    merge(models).save(tmp_path / "out")
    assert [p.name for p in tmp_path.glob(".out*")] == []


KILLS = """
import json, os, random, signal, sys, time
import torch
import weightops.engine.plan as engine
from weightops import open_checkpoint
from weightops.engine import write
from weightops.support.atomic import stage_of
from weightops.merging.merge import merge
from pathlib import Path

torch.set_num_threads(2)
engine.SEGMENT = 1 << 14
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
models = [str(folder / f"m{i}.safetensors") for i in range(3)]

def in_child(out, **options):
    pid = os.fork()
    if pid:
        return pid
    merge(models[1:], "ties", base=models[0], density=0.5).save(out, max_shard_size=1_000_000, **options)
    os._exit(0)

def content(path):
    return {p.name: p.read_bytes() for p in sorted(path.iterdir())} if path.exists() else None

start = time.monotonic()
assert os.waitpid(in_child(folder / "reference"), 0)[1] == 0
duration = time.monotonic() - start
reference = content(folder / "reference")
generator, seen = random.Random(0), {"nothing": 0, "old": 0, "resumed": 0, "done": 0}
for i in range(rounds):
    out = folder / f"out{i}"
    old = None
    if i % 2:
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"old")
        old = content(out)
    pid = in_child(out, overwrite=bool(i % 2))
    time.sleep(generator.uniform(0, 0.6 * duration))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    now = content(out)
    assert now in (old, reference), (i, sorted(now or ()))
    if now == reference:
        seen["done"] += 1
    else:
        begun = list(stage_of(out).glob("journal.0.*"))
        seen["resumed" if any(p.read_text().count(chr(10)) > 1 for p in begun) else "old" if old else "nothing"] += 1
        assert os.waitpid(in_child(out, overwrite=bool(i % 2), resume=True), 0)[1] == 0
        assert content(out) == reference, i
    assert not stage_of(out).exists()
print(json.dumps(seen))
"""


def test_killed_at_fifty_moments(tmp_path: Path) -> None:
    """Nothing, the old output or a state to go on from, which ends in the same bytes."""
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        state = {
            f"layers.{j}.weight": torch.randn(300, 300, generator=generator) for j in range(12)
        }
        open_checkpoint(state).save(tmp_path / f"m{i}.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "50"],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert sum(seen.values()) == 50
    assert seen["resumed"] >= 5, seen


def test_ranks_write_the_same_bytes(family: tuple[str, list[str]], tmp_path: Path) -> None:
    base, models = family
    line = ["merge", *models, "--method", "dare_ties", "--base", base, "--max-shard-size", "1KB"]
    assert run([*line, "-o", str(tmp_path / "one")]) == 0
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "3",
        "-m",
        "weightops",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, *line, "-o", str(tmp_path / "three")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 tensors") == 1
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    assert equal(tmp_path / "one", tmp_path / "three")


def test_a_small_file_system(family: tuple[str, list[str]], tmp_path: Path) -> None:
    """A real one, of a megabyte, where the system lets us have it."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("no right to mount")
    try:
        big = {f"w{i}": torch.ones(100_000) for i in range(4)}
        with pytest.raises(OutputError, match=r"no space left for .*out; nothing was written"):
            merge([big, big]).save(place / "out")
        assert list(place.iterdir()) == []
        merge(family[1]).save(place / "out")
        with pytest.raises(OutputError, match="no space left"):
            merge([big, big]).save(place / "out", overwrite=True)
        assert equal(place / "out", merge(family[1]).save(tmp_path / "again"))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_an_input_cut_short(
    family: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, models = family
    data = Path(models[1]).read_bytes()
    Path(models[1]).write_bytes(data[: len(data) // 2])
    assert run(["merge", *models, "-o", str(tmp_path / "out")]) == 1
    assert "is not a sound safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(["merge", *models, "-o", str(tmp_path / "out"), "--max-shard-size", "tiny"]) == 2


def test_nonfinite_inputs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = [{"good": torch.ones(40), "bad": torch.ones(40)} for _ in range(3)]
    states[1]["bad"][7] = float("nan")
    paths = [
        str(open_checkpoint(s).save(tmp_path / f"{i}.safetensors", on_nonfinite="ignore"))
        for i, s in enumerate(states)
    ]
    for method in ("task_arithmetic", "ties", "magnitude", "dare_linear"):
        line = [
            "merge",
            *paths[1:],
            "--base",
            paths[0],
            "--method",
            method,
            "-o",
            str(tmp_path / "out"),
        ]
        assert run([*line, "--on-nonfinite", "error"]) == 1
        assert "NaN or Inf in 1 tensor: bad" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
