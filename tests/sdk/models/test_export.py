"""A program as a folder of its own: transformers computes from it what the engine computes under the program."""

from __future__ import annotations

import gc
import json
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from polar_sdk import PolarModel, Policy
from polar_sdk.engine.forward import next_logits
from polar_sdk.engine.row import Row
from polar_sdk.errors import ExportError, FolderError, FolderExistsError, ProgramDepthError, ProtectedLayerError
from polar_sdk.models.fingerprint import source_fingerprint
from polar_sdk.models.load import clear_cache
from polar_sdk.programs.program import Program
from polar_sdk.testing import tiny_llama, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

PROMPT = "the sea was calm that day"


def adopt(model: PreTrainedModel) -> PolarModel:
    return PolarModel.from_hf(model, tiny_tokenizer(), policy=Policy.permissive(), ledger=None)


def same_as_the_engine(model: PolarModel, program: str, folder: Path) -> None:
    """Logits at every position, and a greedy answer."""
    exported: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    ids = model.encode(PROMPT)
    decoder = model.loaded.decoder
    with torch.inference_mode():
        theirs = exported(torch.tensor([ids])).logits[0]
        ours = [next_logits(decoder, [Row(decoder, Program.parse(program))], [ids[: at + 1]]) for at in range(len(ids))]
        answer = exported.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(torch.cat(ours), theirs, atol=2e-4, rtol=1e-4)
    done = model.generate(PROMPT, template="raw", program=program, max_tokens=12)
    assert done.token_ids == tuple(answer[0, len(ids) :].tolist())


@pytest.mark.parametrize("program", ["0 2 4", "3 1 5"])
def test_every_variant_computes_the_same_elsewhere(
    tiny_family: Callable[..., PreTrainedModel], variant: str, program: str, tmp_path: Path
) -> None:
    source = tiny_family(variant)
    model = adopt(source)
    before = {name: value.clone() for name, value in source.state_dict().items()}
    try:
        folder = model.export(program, tmp_path / "cut")
    except ExportError as error:
        assert variant == "gpt2, scores scaled by layer"
        assert "at another position" in str(error)
        return
    same_as_the_engine(model, program, folder)
    assert source.config.num_hidden_layers == 6  # the adopted model is not changed
    assert all(bool((value == before[name]).all()) for name, value in source.state_dict().items())


def test_what_depends_on_the_place_of_a_layer_can_stay_in_place(
    tiny_family: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = adopt(tiny_family("gpt2, scores scaled by layer"))
    same_as_the_engine(model, "0-3", model.export("0-3", tmp_path / "cut"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A tiny model as a folder."""
    path = tmp_path / "whole"
    tiny_llama().save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    yield path
    clear_cache()


def read(folder: Path, **settings: Any) -> PolarModel:
    settings = {"precision": "fp32", "policy": Policy.permissive(), **settings}
    return PolarModel.from_pretrained(folder, device="cpu", ledger=None, **settings)


def test_a_model_read_from_files_is_read_again(folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    out = model.export("0 2-5", tmp_path / "new" / "cut")
    assert out == tmp_path / "new" / "cut"
    same_as_the_engine(model, "0 2-5", out)
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.encode(PROMPT, add_special_tokens=False) == model.encode(PROMPT)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    again = read(out)  # and the engine runs it as a model of its own
    there, here = again.generate(PROMPT, max_tokens=9), model.generate(PROMPT, program="0 2-5", max_tokens=9)
    assert there.token_ids == here.token_ids


def test_a_folder_at_full_depth_says_which_model_it_is_until_it_is_changed(folder: Path, tmp_path: Path) -> None:
    model = read(folder)
    whole = model.export(f"0-{model.depth - 1}", tmp_path / "at_full_depth")
    part = model.export("0 2-5", tmp_path / "in_part")
    assert source_fingerprint(whole) == model.fingerprint != source_fingerprint(part)
    changed = json.loads((whole / "config.json").read_text()) | {"rms_norm_eps": 0.5}
    (whole / "config.json").write_text(json.dumps(changed))
    assert source_fingerprint(whole) != model.fingerprint


@pytest.mark.parametrize("name", ["gpt2", "gemma3_text", "mixtral", "qwen2_moe"])
def test_files_whose_weights_have_other_names_in_memory(
    tiny_family: Callable[..., PreTrainedModel], name: str, tmp_path: Path
) -> None:
    """Experts, for one, lie apart in files and together in memory."""
    tiny_family(name).save_pretrained(tmp_path / "at_full_depth")
    tiny_tokenizer().save_pretrained(tmp_path / "at_full_depth")
    model = read(tmp_path / "at_full_depth")
    same_as_the_engine(model, "0 2-3 5", model.export("0 2-3 5", tmp_path / "cut"))
    clear_cache()


def test_the_text_part_of_a_model_that_sees_images(tmp_path: Path) -> None:
    text: dict[str, Any] = {"vocab_size": 260, "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 6}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20, "initializer_range": 0.2}
    text |= {"sliding_window": 6, "sliding_window_pattern": 3, "pad_token_id": None, "eos_token_id": 256}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    source: Any = Gemma3ForConditionalGeneration(config)
    source.train(False)
    model = adopt(source)
    same_as_the_engine(model, "0 2-3 5", model.export("0 2-3 5", tmp_path / "cut"))


def test_the_weights_are_those_of_the_files_whatever_precision_runs(folder: Path, tmp_path: Path) -> None:
    out = read(folder, precision="int8").export("0-5", tmp_path / "cut")
    exported = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    for name, value in tiny_llama().state_dict().items():
        assert torch.equal(exported[name], value)


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("0-2 3x2 4-5", ["'0-2 3x2 4-5' visits layer 3 2 times", "each layer once"]),
        ("0-2 1 4-5", ["visits layer 1 2 times"]),
        ("0-2 3~2 4-5", ["visits layer 3 damped", "without damped"]),
    ],
)
def test_what_no_plain_model_does_is_refused(tmp_path: Path, program: str, words: list[str]) -> None:
    source = tiny_llama()
    with pytest.raises(ExportError) as caught:
        adopt(source).export(program, tmp_path / "cut")
    for word in words:
        assert word in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_programs_that_may_not_run_are_not_exported(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ProgramDepthError):
        read(folder).export("0-6", tmp_path / "cut")
    with pytest.raises(ProtectedLayerError):
        read(folder, policy=Policy(protected=(0, -1))).export("1-5", tmp_path / "cut")


def test_what_lies_there_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    model, out = read(folder), tmp_path / "cut"
    out.mkdir()  # an empty folder is in nobody's way
    model.export("0-4", out)
    with pytest.raises(FolderExistsError, match=r"contains a model already; .*force"):
        model.export("0 5", out)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5
    model.export("0 5", out, force=True)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(FolderExistsError, match="folder of the model itself"):
        model.export("0 5", folder, force=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    for taken in (tmp_path / "notes", tmp_path / "notes" / "text"):
        with pytest.raises(FolderExistsError, match="exists and is not a model folder"):
            model.export("0 5", taken, force=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "ledger.sqlite3") == [
        "cut",
        "notes",
        "whole",
    ]


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing_and_takes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    model, out = read(folder), tmp_path / "cut"
    if force:
        model.export("0-4", out)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    # The real error: a device file that is always full stands where one of the files will be written.
    real = Path.mkdir

    def mkdir(path: Path, *args: Any, **options: Any) -> None:
        real(path, *args, **options)
        if path.name == "new":
            (path / "tokenizer_config.json").symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(FolderError, match=r"cannot be written .*No space left.*nothing was left behind"):
        model.export("0 5", out, force=force)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 20 kB: weights do not fit, and safetensors reports that in an error of its own."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_weights_that_do_not_fit_leave_nothing(folder: Path, tmp_path: Path, small_files: None) -> None:
    model = read(folder)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with pytest.raises(FolderError, match=r"cannot be written .*File too large"):
        model.export("0 5", tmp_path / "cut")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_folder_where_nothing_may_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot be written"):
        read(folder).export("0 5", tmp_path / "file" / "cut")


def test_an_adopted_model_must_still_be_there(tmp_path: Path) -> None:
    model = adopt(tiny_llama())
    gc.collect()
    with pytest.raises(ExportError, match=r"not available.*Keep that model"):
        model.export("0 5", tmp_path / "cut")
