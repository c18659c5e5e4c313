"""What `sima convert` refuses, in which words, and that it leaves nothing behind then; its lines and options."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from original_llava import make_parts, original_config, write_json, write_original, write_tower
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sima_ray.cli import app
from sima_ray.errors import ModelError
from sima_ray.policy import convert as convert_module
from sima_ray.policy.checkpoint import check_policy
from sima_ray.policy.convert import convert
from sima_ray.policy.convert_config import Layout

FIRST, SECOND = (f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2))
INDEX = "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = make_parts()
    folder = write_original(tmp_path_factory.mktemp("original") / "model", parts)
    write_tower(folder / "somebody" / "small-clip", parts)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture(scope="module")
def hf(original: Path) -> Path:
    convert(original, original.parent / "hf")
    return original.parent / "hf"


def change(**values: Any) -> Callable[[Path], None]:
    return lambda folder: write_json(folder / "config.json", original_config(**values))


def rewrite(file: str, edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = torch.load(folder / file)
        edit(weights)
        torch.save(weights, folder / file)

    return apply


def truncate(file: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / file
        path.write_bytes(path.read_bytes()[:-1000])

    return apply


def forget(name: str) -> Callable[[Path], None]:
    """Without a weight, in the file and in the index."""

    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        rewrite(index["weight_map"].pop(name), lambda weights: weights.pop(name))(folder)
        write_json(folder / INDEX, index)

    return apply


class Payload:
    """Would run code when it is unpickled carelessly."""

    def __reduce__(self) -> Any:
        return (print, ("executed",))


NORM = "model.norm.weight"
CASES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("no folder", shutil.rmtree, "no such folder"),
    ("no config", lambda f: (f / "config.json").unlink(), r"no config\.json"),
    ("no weights", lambda f: (f / INDEX).unlink(), "holds no weights"),
    ("index", lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: not an index"),
    ("missing file", lambda f: (f / SECOND).unlink(), f"names {SECOND}, which is not there"),
    (
        "file elsewhere",
        lambda f: write_json(f / INDEX, {"weight_map": {"a": "../other.bin"}}),
        "outside its folder",
    ),
    ("truncated", truncate(FIRST), f"{FIRST}: not a whole PyTorch file"),
    ("empty file", lambda f: (f / FIRST).write_bytes(b""), f"{FIRST}: not a whole PyTorch file"),
    ("no tensors", rewrite(SECOND, lambda w: w.update(a=1)), f"{SECOND}: a is a int"),
    ("code", rewrite(SECOND, lambda w: w.update(a=Payload())), "nothing else is loaded from it"),
    (
        "not in its file",
        rewrite(FIRST, lambda w: w.pop(NORM)),
        f"{FIRST}: lacks {NORM}, which the index names",
    ),
    (
        "twice",
        rewrite(SECOND, lambda w: w.update({NORM: torch.ones(64)})),
        f"{SECOND}: {NORM} is also in {FIRST}",
    ),
    ("missing weight", forget(NORM), f"lacks 1 of 105 weights: {NORM}"),
    ("missing embeddings", forget("model.embed_tokens.weight"), r"lacks model\.embed_tokens"),
    (
        "unknown weight",
        rewrite(FIRST, lambda w: w.update({"model.image_newline": w[NORM]})),
        rf"{FIRST}: model.image_newline \(64,\): no such weight",
    ),
    ("more layers", change(num_hidden_layers=2), r"layers\.2\..* no such weight .* 2 layers"),
    (
        "two names",
        rewrite(FIRST, lambda w: w.update({"language_model.model.norm.weight": w[NORM]})),
        "are the same weight",
    ),
    (
        "shape",
        rewrite(FIRST, lambda w: w.update({NORM: w[NORM][:9]})),
        rf"{FIRST}: {NORM} is \(9,\), by the config \(64,\)",
    ),
    ("vocabulary", change(vocab_size=449), r"lm_head.weight is \(450, 64\), by the config \(449"),
    (
        "quantized",
        rewrite(FIRST, lambda w: w.update({NORM: w[NORM].to(torch.int8)})),
        f"{NORM} is torch.int8: quantized",
    ),
    (
        "no tokenizer",
        lambda f: (f / "tokenizer.model").unlink(),
        r"no tokenizer \(tokenizer.model or",
    ),
    (
        "broken tokenizer",
        lambda f: (f / "tokenizer.model").write_bytes(b"junk"),
        "tokenizer cannot be read",
    ),
    ("mistral", change(model_type="llava_mistral"), "model_type llava_mistral; only LLaVA"),
    ("qwen", change(model_type="llava_qwen"), "model_type llava_qwen; only LLaVA"),
    ("vila", change(llm_cfg="llm"), "a VILA folder"),
    ("llama", change(model_type="llama"), "a Llama without vision"),
    ("next", change(image_aspect_ratio="anyres"), "LLaVA-NeXT"),
    ("start and end", change(mm_use_im_start_end=True), "mm_use_im_start_end"),
    ("projector", change(mm_projector_type="linear"), "mm_projector_type linear"),
    ("tied", change(tie_word_embeddings=True), "tie_word_embeddings"),
    ("feature", change(mm_vision_select_feature="cls"), "mm_vision_select_feature cls"),
    ("config", change(num_hidden_layers="three"), r"config\.json: .*num_hidden_layers"),
    ("unknown tower", change(mm_vision_tower="google/siglip"), "'google/siglip' is no folder and"),
]


@pytest.mark.parametrize(("spoil", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_folder_that_cannot_be_converted(
    model: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None], words: str
) -> None:
    spoil(model)
    before = {file.name for file in model.parent.iterdir()}
    with pytest.raises(ModelError, match=words) as raised:
        convert(model, model.parent / "out")
    assert "\n" not in str(raised.value) and str(model) in str(raised.value)
    assert {file.name for file in model.parent.iterdir()} == before
    assert "executed" not in capsys.readouterr().out


def test_a_tower_that_is_nowhere(model: Path) -> None:
    """A checkpoint without it, and a name that is known; then a folder that is no such tower."""
    for file in (FIRST, SECOND):
        rewrite(file, lambda w: [w.pop(name) for name in list(w) if "vision_tower" in name])(model)
    index = json.loads((model / INDEX).read_text())
    held = {k: v for k, v in index["weight_map"].items() if "vision_tower" not in k}
    write_json(model / INDEX, {"weight_map": held})
    name = "openai/clip-vit-large-patch14-336"
    write_json(model / "config.json", original_config(mm_vision_tower=name))
    with pytest.raises(
        ModelError, match=r"projector\.0\.weight is \(64, 32\), by the config \(64, 1024"
    ):
        convert(model, model.parent / "out")
    tower = model / "somebody" / "small-clip"
    renamed = tower.rename(model / "small-clip")
    write_json(model / "config.json", original_config(mm_vision_tower=str(tower)))
    with pytest.raises(ModelError, match="is no folder and no known name"):
        convert(model, model.parent / "out")
    (renamed / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="small-clip: holds no weights"):
        convert(model, model.parent / "out", vision_tower=renamed)
    write_json(renamed / "config.json", {"model_type": "siglip_vision_model"})
    with pytest.raises(ModelError, match="model_type siglip_vision_model"):
        convert(model, model.parent / "out", vision_tower=renamed)


def test_a_known_tower_that_is_only_named(tmp_path: Path) -> None:
    """As in liuhaotian/llava-v1.5-7b: what is missing is said, and where to give it."""
    from sima_ray.policy.convert_keys import TOWER, original_name, published_shapes
    from sima_ray.policy.convert_source import check_weights, read_source

    name = "openai/clip-vit-large-patch14-336"
    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    values = original_config(mm_vision_tower=name, **sizes, **heads)
    write_json(tmp_path / "config.json", values)
    torch.save({"model.embed_tokens.weight": torch.ones(8, 4)}, tmp_path / "pytorch_model.bin")
    shapes = published_shapes(read_source(tmp_path, None, None, with_tower=True).config)
    weights = {original_name(n): torch.ones(s) for n, s in shapes.items() if TOWER not in n}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    source = read_source(tmp_path, None, None, with_tower=True)
    with pytest.raises(
        ModelError, match=rf"only names it \({name}\); give its folder: --vision-tower"
    ):
        check_weights(source, None, with_tower=True)
    check_weights(source, None, with_tower=False)


def test_a_broken_hugging_face_folder(hf: Path, tmp_path: Path) -> None:
    folder, out = Path(shutil.copytree(hf, tmp_path / "hf")), tmp_path / "out"
    with pytest.raises(ModelError, match="has the hf layout already"):
        convert(folder, out)
    with pytest.raises(ModelError, match="leave out --vision-tower"):
        convert(folder, out, to=Layout.ORIGINAL, vision_tower=hf)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"text_config": {"model_type": "mistral"}})
    with pytest.raises(ModelError, match="text_config of model_type mistral"):
        convert(folder, out, to=Layout.ORIGINAL)
    write_json(folder / "config.json", config | {"image_token_index": 7})
    with pytest.raises(ModelError, match="<image> is token 450, by the config 7"):
        convert(folder, out, to=Layout.ORIGINAL)
    write_json(folder / "config.json", config | {"vision_feature_layer": [-2, -5]})
    with pytest.raises(ModelError, match="several vision_feature_layer"):
        convert(folder, out, to=Layout.ORIGINAL)
    write_json(folder / "config.json", config)
    truncate("model.safetensors")(folder)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a whole safetensors file"):
        convert(folder, out, to=Layout.ORIGINAL)
    assert not out.exists()


def test_a_number_that_does_not_fit_is_found_on_the_way(model: Path) -> None:
    """Half of it is written then; nothing of it stays."""
    rewrite(FIRST, lambda w: w.update({NORM: w[NORM] * 1e6}))(model)
    with pytest.raises(ModelError, match=f"{FIRST}: .*norm.weight does not fit float16"):
        convert(model, model.parent / "out", dtype="float16")
    rewrite(FIRST, lambda w: w.update({NORM: w[NORM] * torch.nan}))(model)
    with pytest.raises(
        ModelError, match=f"{FIRST}: .*norm.weight holds values that are not finite"
    ):
        convert(model, model.parent / "out", dtype="float16")
    assert [file.name for file in model.parent.iterdir()] == ["model"]


def test_what_is_there_stays_unless_told(hf: Path, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(original, out)  # into an empty folder
    with pytest.raises(ModelError, match=r"already there; .* --force"):
        convert(hf, out, to=Layout.ORIGINAL)
    check_policy(out)
    convert(hf, out, to=Layout.ORIGINAL, force=True)
    assert "mm_vision_tower" in (out / "config.json").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter").write_text("Dear …")
    with pytest.raises(ModelError, match="no model folder, so --force leaves it alone"):
        convert(original, other, force=True)
    for place in (original, original / "out", original.parent):
        with pytest.raises(ModelError, match="which is read"):
            convert(original, place, force=True)


def test_bases_belong_to_adapters(original: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--base is for LoRA folders"):
        convert(original, tmp_path / "out", base=original)
    write_json(tmp_path / "adapter_config.json", {})
    with pytest.raises(ModelError, match="give what it was trained on: --base"):
        convert(tmp_path, tmp_path.with_suffix(".out"))


def test_a_full_disk_is_said_before(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"needs 0\.0 GB, and .* has 0\.0 GB free"):
        convert(original, tmp_path / "out")


def test_a_result_that_was_written_wrongly_is_not_published(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert_module, "weight_names", lambda folder: {"other"})
    with pytest.raises(ModelError, match="was written wrongly"):
        convert(hf, tmp_path / "out", to=Layout.ORIGINAL)
    assert not list(tmp_path.iterdir())


def test_the_command_says_each_file_and_what_came_of_it(original: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(original), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    first, second, result = done.output.splitlines()
    assert first.startswith(f"1/2  {FIRST} · ") and second.startswith(f"2/2  {SECOND} · ")
    assert result == (
        f"{tmp_path / 'out'}: 109 tensors read, 105 written · 0.00 GB of float32 in 1 file · "
        "3 left out (rotary frequencies, which the config gives) · "
        "1 left out (position numbers, which count up) · vocabulary 450 → 512"
    )
    back = [str(tmp_path / "out"), str(tmp_path / "back"), "--to=original", "--dtype=bfloat16"]
    done = CliRunner().invoke(app, ["convert", *back])
    assert "105 were of another type · vocabulary 512 → 450" in done.output
    names = load_file(tmp_path / "back" / "model.safetensors")
    save_file(
        {k: v for k, v in names.items() if k != NORM}, tmp_path / "back" / "model.safetensors"
    )
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "back"), str(tmp_path / "third")])
    assert isinstance(done.exception, ModelError) and NORM in str(done.exception)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['sima', 'convert', '--help']\n"
        "from sima_ray.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'transformers', 'safetensors', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--vision-tower" in done.stdout
