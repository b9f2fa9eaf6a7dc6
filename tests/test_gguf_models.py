"""GGUF files as models, against what they were exported from: weights, tokens, special ids, templates."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf_models
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import mspc
from mspc.errors import InputError
from mspc.model import gguf_config, gguf_file
from mspc.model.hub import resolve

gguf = pytest.importorskip("gguf")

LLAMA = Path(__file__).parent.parent / "examples" / "tiny_llama"
VOCABULARY = json.loads((LLAMA / "config.json").read_text())["vocab_size"]
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
SENTENCE = "Hello, world!  It's 2024:\n\n the the déjà vu 123456"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, artifact_of: Callable[..., mspc.Artifact]
) -> Callable[..., tuple[mspc.Artifact, Path]]:
    """`exported(bits)`: a Llama in 16, 8 or 4 bits, and its GGUF file, once."""
    made: dict[int, tuple[mspc.Artifact, Path]] = {}

    def get(bits: int = 16) -> tuple[mspc.Artifact, Path]:
        if bits not in made:
            folder = tmp_path_factory.mktemp("gguf")
            model, out = folder / "model", folder / "out"
            ids = {"bos_token_id": 0, "eos_token_id": 0}
            tiny.build(model, "llama", hidden_size=64, vocab_size=VOCABULARY, **ids)
            for file in LLAMA.glob("tokenizer*"):
                shutil.copy(file, model)
            artifact = artifact_of(model, bits=bits, **({"sparsity": 0.5} if bits == 16 else {}))
            mspc.export(artifact, "gguf", out=out, progress=False)
            made[bits] = artifact, next(out.glob("*.gguf"))
        return made[bits]

    return get


KINDS = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.float() for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}


@pytest.mark.parametrize(
    ("bits", "origin"),
    [(16, None), (8, "Q8_0"), (4, "Q4_0")],
)
def test_weights_are_those_of_the_artifact(exported, tmp_path, bits, origin):
    artifact, file = exported(bits)
    folder = resolve(str(file))
    mspc.export(artifact, "dense", out=tmp_path / "dense", progress=False)
    expected, found = weights_of(tmp_path / "dense"), weights_of(folder)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight.bfloat16().float()) or torch.equal(found[name], weight), name
    assert json.loads((folder / "config.json").read_text()).get("dequantized_from") == origin


@pytest.mark.parametrize(
    "family",
    [
        name if name in ("llama-3.1", "gemma3-linear", "phi3-partial") else pytest.param(name, marks=pytest.mark.slow)
        for name in gguf_models.MODELS
    ],
)
def test_every_family_computes_what_it_did(family, calibration, tmp_path):
    """Oracle: the dense export, by transformers. 90 tokens, beyond windows and original contexts."""
    model = gguf_models.build(family, tmp_path / "model")
    artifact = tiny.compress(model, tmp_path / "artifact", calibration, sparsity=0.5, effort="fast")
    for name in ("gguf", "dense"):
        mspc.export(artifact, name, out=tmp_path / name, verify=False, progress=False)
    folder = resolve(str(next((tmp_path / "gguf").glob("*.gguf"))))
    ids = torch.randint(10, 300, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32)(ids).logits
            for one in (tmp_path / "dense", folder)
        )
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("theta", "dims", "factor", "context"),
    [(500000.0, 128, 8.0, 8192), (500000.0, 64, 32.0, 8192), (500.0, 16, 4.0, 32), (10000.0, 32, 2.0, 4096)],
)
def test_the_scaling_of_llama_3_is_found_from_its_factors(theta, dims, factor, context):
    """Oracle: transformers' frequencies with and without it. The first two are Llama 3.1 8B and 3.2 1B."""
    scaled = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": context, "rope_theta": theta}
    config = LlamaConfig(head_dim=dims, max_position_embeddings=131072, rope_parameters=scaled)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** -(torch.arange(0, dims, 2) / dims)
    found = gguf_config.llama3_rope((plain / frequencies).float(), theta, dims)
    assert found == {name: value for name, value in scaled.items() if name != "rope_theta"}


@pytest.mark.parametrize("factors", [torch.ones(8), torch.tensor([1.0, 2.0] * 4), torch.full((4,), 8.0)])
def test_factors_of_another_scaling_are_refused(factors):
    with pytest.raises(InputError, match=r"rope_freqs\.weight, are those of no Llama 3\.1"):
        gguf_config.llama3_rope(factors, 500.0, 16)


def test_tokens_special_ids_and_template_are_those_of_the_source(exported, tmp_path):
    folder = resolve(str(changed(exported()[1], tmp_path / "m.gguf", chat_template=TEMPLATE)))
    found, expected = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(exported()[0].path)
    assert found(SENTENCE)["input_ids"] == expected(SENTENCE)["input_ids"]
    assert (found.bos_token_id, found.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == expected.eos_token_id
    assert found.chat_template == TEMPLATE


def changed(file: Path, out: Path, **values: object) -> Path:
    """A copy of a GGUF file with other values of `tokenizer.NAME`; None leaves the key out."""
    named = {f"tokenizer.{'' if name == 'chat_template' else 'ggml.'}{name}": value for name, value in values.items()}
    return copied(gguf.GGUFReader(file), out, named)


def copied(reader: gguf.GGUFReader, out: Path, named: dict[str, object]) -> Path:
    """The content of a reader as a file, with other values of some keys."""
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in named:
            continue
        sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub)
    for key, value in named.items():
        if value is not None:
            writer.add_key_value(key, value, KINDS[type(value)])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("values", "begins"),
    [
        ({"add_bos_token": True}, True),
        ({"add_bos_token": False}, False),
        ({"add_bos_token": None}, False),  # a byte-level vocabulary
    ],
)
def test_texts_begin_as_the_file_says(exported, tmp_path, values, begins):
    folder = resolve(str(changed(exported()[1], tmp_path / "m.gguf", **values)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) is begins
    assert tokenizer.decode(tokenizer(SENTENCE)["input_ids"], skip_special_tokens=True) == SENTENCE


@pytest.mark.parametrize(
    ("values", "ends"), [({"eot_token_id": 5}, [2, 5]), ({"eot_token_id": 2}, 2), ({"eom_token_id": 7}, [2, 7])]
)
def test_every_end_of_the_file_ends_a_text(exported, tmp_path, values, ends):
    folder = resolve(str(changed(exported()[1], tmp_path / "m.gguf", eos_token_id=2, **values)))
    assert GenerationConfig.from_pretrained(folder).eos_token_id == ends


def test_a_file_is_made_dense_once(exported, monkeypatch):
    file = exported()[1]
    first = resolve(str(file))
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("made again"))
    assert resolve(str(file)) == first
    assert first.name == file.stem


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model", b"GGUF\x03\0\0\0" + 16 * b"\xff"])
def test_damaged_files_are_refused(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(InputError, match=r"m\.gguf is no whole GGUF file"):
        resolve(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_files_that_are_cut_off_are_refused(exported, tmp_path):
    content = exported()[1].read_bytes()
    for share in (0.3, 0.6, 0.999):
        (tmp_path / "m.gguf").write_bytes(content[: int(share * len(content))])
        with pytest.raises(InputError, match=r"m\.gguf"):
            resolve(str(tmp_path / "m.gguf"))
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def without(file: Path, out: Path, part: str, **more: object) -> Path:
    """A copy without the tensors whose names contain `part`."""
    reader = gguf.GGUFReader(file)
    reader.tensors = [tensor for tensor in reader.tensors if part not in tensor.name]
    return copied(reader, out, more)


@pytest.mark.parametrize("part", ["blk.1.", "blk.0.attn_q.weight", "output_norm", "ffn_up"])
def test_a_file_without_some_tensors_is_refused(exported, tmp_path, part):
    """transformers would make up their weights."""
    with pytest.raises(InputError, match=r"has [\d,]+ weights, and the llama model that it describes has [\d,]+"):
        resolve(str(without(exported()[1], tmp_path / "m.gguf", part)))


def test_a_part_of_a_file_is_refused(exported, tmp_path):
    with pytest.raises(InputError, match=r"is one part of 2\. Join them first"):
        resolve(str(without(exported()[1], tmp_path / "m.gguf", "-", **{"split.count": 2})))


def test_a_tokenizer_next_to_the_file_is_not_taken_for_its_own(exported, tmp_path):
    file = shutil.copy(exported()[1], tmp_path / "m.gguf")
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("broken")
    (tmp_path / "config.json").write_text("broken")
    found = AutoTokenizer.from_pretrained(resolve(str(file)))
    assert found(SENTENCE)["input_ids"] == AutoTokenizer.from_pretrained(exported()[0].path)(SENTENCE)["input_ids"]


def test_a_folder_that_another_process_has_made_stays(exported, tmp_path, monkeypatch):
    file = shutil.copy(exported()[1], tmp_path / "m.gguf")
    write = gguf_file._write

    def slowly(path: Path, new: Path, *rest: object) -> None:
        monkeypatch.setattr(gguf_file, "_write", write)
        first.append(resolve(str(file)).stat().st_ino)
        write(path, new, *rest)

    first: list[int] = []
    monkeypatch.setattr(gguf_file, "_write", slowly)
    folder = resolve(str(file))
    assert [folder.stat().st_ino] == first
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rope.scaling.type": "longrope"}, "is scaled by longrope"),
        ({"rope.scaling.attn_factor": 3.0}, "rope.scaling.attn_factor of 3.0"),
        ({"rope.scaling.yarn_beta_fast": 16.0}, "rope.scaling.yarn_beta_fast of 16.0"),
    ],
)
def test_scalings_that_no_config_describes_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        gguf_config._rope(fields, 16, None)


def test_a_factor_without_a_type_is_linear():
    """As in llama.cpp."""
    assert gguf_config._rope({"rope.scaling.factor": 4.0}, 16, None)["rope_type"] == "linear"
    assert gguf_config._rope({"rope.scaling.factor": 1.0}, 16, None)["rope_type"] == "default"


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "abacus")
    writer.add_tensor("blk.0.attn_q.weight", torch.zeros(2, 2).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="transformers cannot read it .*abacus"):
        resolve(str(tmp_path / "m.gguf"))


def test_a_file_larger_than_memory_is_refused(exported, monkeypatch):
    monkeypatch.setattr(gguf_file, "free_memory", lambda _: 1000)
    with pytest.raises(InputError, match=r"takes 0\.\d GB of memory, and 0\.0 GB are free"):
        resolve(str(exported()[1]))


def test_without_the_extra_it_is_named(exported, monkeypatch):
    monkeypatch.setattr(gguf_file, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'mspc\[gguf\]'"):
        resolve(str(exported()[1]))


def test_a_file_is_a_model_of_every_verb(exported, calibration, test_text, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="mspc")
    source, file = exported(8)
    artifact = tiny.compress(file, tmp_path / "small", calibration, sparsity=0.5)
    assert artifact.manifest["source"]["name"] == file.stem
    found, expected = (mspc.evaluate(one, test_text, sequence_length=64, progress=False) for one in (file, source))
    assert found.perplexity == pytest.approx(expected.perplexity, rel=5e-3)  # its scales were rounded to bfloat16
    said = "The reference was dequantized from Q8_0; a 4-bit method on that grid can look lossless."
    assert caplog.messages.count(said) == 2  # of compress and of the first evaluation
