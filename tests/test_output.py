"""Output folders: an old output is there, whole, until the new one is. Checked after every kill."""

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import tiny
from test_resume import content, killed_at, run

import mspc
from mspc.errors import InputError, StorageError
from mspc.storage.journal import NAME as JOURNAL
from mspc.storage.manifest import MANIFEST, read_manifest
from mspc.storage.output_folder import held, made_and_held, publish, recover, sibling, working_folder


def filled(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text(folder.name)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fresh(out: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    folder = working_folder(out, resume=resume, overwrite=overwrite)
    with made_and_held(folder):
        return folder


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_new_output_is_written_in_place(flags, tmp_path):
    assert fresh(tmp_path / "deep" / "out", **flags) == tmp_path / "deep" / "out"
    assert fresh(tmp_path / "deep" / "out", **flags) == tmp_path / "deep" / "out"  # it is empty
    assert names(tmp_path) == ["deep"]


@pytest.mark.parametrize(
    ("file", "state"),
    [
        (MANIFEST, r"a finished artifact\. Choose another --out, or replace it with --overwrite\."),
        (JOURNAL, r"an unfinished run\. Continue it with --resume, or replace it with --overwrite\."),
    ],
)
def test_an_older_output_needs_a_decision(file, state, tmp_path):
    out = filled(tmp_path / "out", file)
    with pytest.raises(InputError, match=f"out holds {state}"):
        fresh(out)
    assert fresh(out, resume=True) == out
    assert fresh(out, overwrite=True) == tmp_path / ".out.new"
    assert names(out) == [file]


def test_resume_goes_on_beside_where_the_run_was(tmp_path):
    out = filled(tmp_path / "out", MANIFEST)
    beside = fresh(out, overwrite=True)
    (beside / JOURNAL).write_text("")
    assert fresh(out, resume=True) == beside
    assert names(beside) == [JOURNAL]
    assert fresh(out, overwrite=True) == beside
    assert names(beside) == []  # begun anew


def test_a_run_begun_anew_is_not_resumed_as_an_older_one(tmp_path):
    """A folder that an interrupted --overwrite left goes when the next run neither resumes nor replaces."""
    out = filled(tmp_path / "out", MANIFEST)
    (fresh(out, overwrite=True) / JOURNAL).write_text("")
    shutil.rmtree(out)
    assert fresh(out) == out
    assert fresh(out, resume=True) == out


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_folders_of_others_are_not_touched(flags, tmp_path):
    out = filled(tmp_path / "out", "thesis.tex")
    with pytest.raises(InputError, match="out is not empty and was not written by mspc"):
        fresh(out, **flags)
    with pytest.raises(InputError, match=r"thesis\.tex is a file; --out needs a folder"):
        fresh(out / "thesis.tex", **flags)
    assert names(out) == ["thesis.tex"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("flags", [{"resume": True}, {"overwrite": True}], ids=str)
def test_a_folder_in_use_is_not_touched(flags, tmp_path):
    out = filled(tmp_path / "out", JOURNAL)
    beside = filled(sibling(out, "new"), JOURNAL)
    for used in (out, beside):
        with held(used), pytest.raises(InputError, match=r"is being written by another mspc process"):
            fresh(out, **flags)
        assert names(beside) == names(out) == [JOURNAL]
    fresh(out, **flags)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Cannot make .*file/out"):
        fresh(tmp_path / "file" / "out")


def test_a_folder_that_another_process_made_or_took_stays(tmp_path):
    """Two processes find the same folder missing; the one that is refused leaves it to the other."""
    new = tmp_path / "deep" / ".out.new"
    with made_and_held(new):
        with pytest.raises(InputError, match="being written by another"), made_and_held(new):
            pass
        assert new.is_dir()
    with pytest.raises(OSError, match="full"), made_and_held(new):
        raise OSError("full")
    assert new.is_dir()  # it was there before


def test_a_refused_process_leaves_the_folder_that_it_made_to_the_one_that_took_it(tmp_path, monkeypatch):
    new = tmp_path / "deep" / ".out.new"
    mkdir, others = Path.mkdir, ExitStack()

    def taken_at_once(path: Path) -> None:
        mkdir(path)
        if path == new:
            others.enter_context(held(new))

    monkeypatch.setattr(Path, "mkdir", taken_at_once)
    with others:
        with pytest.raises(InputError, match="being written by another"), made_and_held(new):
            pass
        assert new.is_dir()


def test_the_current_folder_and_links_are_folders_too(tmp_path, monkeypatch):
    filled(tmp_path / "out", MANIFEST)
    monkeypatch.chdir(tmp_path / "out")
    (tmp_path / "link").symlink_to("out")
    for out in (Path(), Path("../out"), tmp_path / "link"):
        assert fresh(out, overwrite=True) == tmp_path / ".out.new"
    publish(fresh(Path(), overwrite=True), Path())
    assert names(tmp_path) == ["link", "out"]
    assert names(tmp_path / "out") == []


def test_publishing_in_place_removes_what_a_killed_run_left(tmp_path):
    out = filled(tmp_path / "out", "new")
    filled(tmp_path / ".out.old", "older")
    publish(out, out)
    assert names(tmp_path) == ["out"]
    assert names(out) == ["new"]


@pytest.mark.parametrize(
    ("present", "left"),
    [
        ({"out": None, ".out.new": "new"}, {".out.new": "new", "out": "old"}),  # made by hand after the kill
        ({"out": "new"}, {"out": "new"}),  # killed after the second rename
        ({"out": "other", ".out.new": "new"}, {"out": "other", ".out.new": "new", ".out.old": "old"}),
    ],
    ids=str,
)
def test_the_older_folder_goes_only_when_the_new_one_has_its_place(present, left, tmp_path):
    filled(tmp_path / ".out.old", "old")
    for name, file in present.items():
        filled(tmp_path / name, *([file] if file else []))
    recover(tmp_path / "out")
    assert {name: names(tmp_path / name) for name in names(tmp_path)} == {name: [file] for name, file in left.items()}


@pytest.fixture(scope="module")
def recipe(calibration: Path) -> mspc.Recipe:
    return mspc.Recipe(
        pattern="2:4", solver="mask", criterion="magnitude", calibration=str(calibration), num_sequences=1,
        sequence_length=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def older(llama: Path, recipe: mspc.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(llama, mspc.Recipe(**recipe.to_dict() | {"seed": 9}), tmp_path_factory.mktemp("older") / "out").path


@pytest.fixture(scope="module")
def newer(llama: Path, recipe: mspc.Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(run(llama, recipe, tmp_path_factory.mktemp("newer") / "out").path)


@pytest.mark.parametrize(("owner", "name", "least"), [(os, "fsync", 15), (Path, "rename", 2), (shutil, "rmtree", 3)])
def test_killed_while_replacing_and_resumed(owner, name, least, llama, recipe, older, newer, tmp_path):
    """Oracle: after the kill a whole artifact, old or new, is there; after --resume, the bytes of a run in place."""
    before, kills = content(older), 0
    while True:
        out = tmp_path / str(kills) / "out"
        shutil.copytree(older, out)
        if not killed_at(kills + 1, owner, name, lambda out=out: run(llama, recipe, out, overwrite=True)):
            break
        kills += 1
        present = [content(folder) for folder in (out, sibling(out, "new")) if (folder / MANIFEST).is_file()]
        assert before in present or newer in present, f"killed at {name} {kills}"
        if sibling(out, "new").is_dir() or content(out) == newer:
            run(llama, recipe, out, resume=True)
        else:  # nothing was begun yet, and so the older run is what there is to resume
            with pytest.raises(InputError, match=r"settings\.seed was 9 and is 0"):
                run(llama, recipe, out, resume=True)
            run(llama, recipe, out, overwrite=True)
        assert content(out) == newer, f"killed at {name} {kills}"
        assert names(out.parent) == ["out"], f"killed at {name} {kills}"
    assert kills >= least
    assert content(out) == newer


def test_a_full_disk_while_replacing_leaves_the_older_and_can_be_resumed(
    llama, recipe, older, newer, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(older, out)

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(StorageError, match=r"Cannot write .*No space left.*--resume"):
            run(llama, recipe, out, overwrite=True)
    assert content(out) == content(older)
    run(llama, recipe, out, resume=True)
    assert content(out) == newer


def test_a_disk_too_small_is_noticed_before_anything_is_solved(llama, recipe, tmp_path, monkeypatch):
    """Oracle: the artifact of this recipe takes 30 to 100 kB."""
    monkeypatch.setattr("mspc.pipeline.run.solve_blocks", lambda *args: pytest.fail("solved"))
    for free in (0, 30_000):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: shutil._ntuple_diskusage(10**6, 0, free))
        with pytest.raises(StorageError, match=r"KB free, and the output needs about .* KB: free"):
            run(llama, recipe, tmp_path / str(free))


@pytest.mark.parametrize("made", [False, True])
def test_a_run_that_cannot_begin_leaves_nothing_behind(made, llama, recipe, tmp_path):
    wrong = mspc.Recipe(**recipe.to_dict() | {"calibration": "nowhere.txt"})
    if made:
        run(llama, recipe, tmp_path / "out")
    before = content(tmp_path / "out") if made else None
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        run(llama, wrong, tmp_path / "out", overwrite=True)
    assert names(tmp_path) == (["out"] if made else [])
    assert not made or content(tmp_path / "out") == before


@pytest.mark.parametrize("out", ["out", "deep/er/and/out", "here/out", "here"])
@pytest.mark.parametrize(
    "wrong",
    [{"calibration": "nowhere.txt"}, {"only": ["nothing"]}, {"num_sequences": 10**6}, {"bits": 4, "group_size": 7}],
)
def test_a_refused_run_makes_no_folder(wrong, out, llama, recipe, tmp_path):
    """Folders that were there before stay, also empty ones."""
    (tmp_path / "here").mkdir()
    asked = mspc.Recipe(**recipe.to_dict() | {"calibration": recipe.calibration} | wrong)
    with pytest.raises(InputError):
        run(llama, asked, tmp_path / out)
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("exports", [["gguf"], ["dense", "gptq"], ["sparse", "compressed-tensors"]])
def test_a_run_whose_exports_cannot_be_made_leaves_nothing(exports, llama, recipe, tmp_path):
    with pytest.raises(InputError, match="quantize|takes"):
        mspc.compress(
            llama, mspc.Recipe(**recipe.to_dict() | {"bits": 16 if "gguf" not in exports else 3}),
            out=tmp_path / "a" / "out", exports=exports, progress=False,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_model_in_memory_that_is_refused_leaves_nothing(llama, recipe, tmp_path):
    model = tiny.reference(llama)
    for wrong in ({"only": ["nothing"]}, {"skip": ["nothing"]}, {"calibration": "nowhere.txt"}):
        asked = mspc.Recipe(**recipe.to_dict() | wrong)
        with pytest.raises(InputError, match="nothing|nowhere"):
            mspc.compress(model, asked, out=tmp_path / "a" / "b", tokenizer=tiny.byte_tokenizer(), progress=False)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", ["gptq", "nope", "onnx"])
def test_an_export_that_is_refused_or_fails_leaves_nothing(wrong, older, tmp_path, monkeypatch):
    artifact, options = mspc.Artifact(older), {"weights": "qdq"} if wrong == "onnx" else {}
    with pytest.raises(InputError):
        artifact.export(wrong, tmp_path / "a" / "b", progress=False, **options)
    monkeypatch.setattr("exporters.dense.write_shards", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        artifact.export("dense", tmp_path / "a" / "b", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_is_no_artifact_yet(llama, recipe, tmp_path):
    out = tmp_path / "out"
    assert killed_at(12, os, "fsync", lambda: run(llama, recipe, out))
    with pytest.raises(InputError, match=r"out holds an unfinished run; finish it with `mspc compress .* --resume`"):
        read_manifest(out)
    with pytest.raises(InputError, match="out is an mspc artifact already. Compress the original"):
        run(out, recipe, tmp_path / "again")
    with pytest.raises(InputError, match="holds an unfinished run"):
        mspc.Artifact(out).export("dense", tmp_path / "dense")


@pytest.fixture
def mounted(tmp_path, monkeypatch) -> Path:
    """A folder that cannot be renamed, as a mount point cannot."""
    out = tmp_path / "volume"
    out.mkdir()
    original, rename = os.path.ismount, Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if out in (path, target):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out or original(path))
    monkeypatch.setattr(Path, "rename", refuse)
    return out


def test_an_artifact_on_a_mount_point_is_replaced_inside_it(llama, recipe, older, newer, mounted):
    """Oracle: the same run in an ordinary folder."""
    shutil.copytree(older, mounted, dirs_exist_ok=True)
    run(llama, recipe, mounted, overwrite=True)
    assert content(mounted) == newer
    assert sorted(path.name for path in mounted.parent.iterdir()) == ["volume"]
    assert not list(mounted.glob(".*"))


def test_exports_go_to_a_mount_point(older, mounted, tmp_path):
    for overwrite in (False, True):
        mspc.export(older, "dense", mounted, overwrite=overwrite, progress=False)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["volume"]
        assert not list(mounted.glob(".*"))
    assert mspc.verify(mounted, older, progress=False)


def test_nothing_is_written_next_to_a_mount_point_unless_it_is_asked_for(older, mounted, monkeypatch):
    """Next to it is a read-only file system, where Linux refuses to remove even what is not there."""

    def refusing(method: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *args: object, **options: object) -> object:
            if path.parent == mounted.parent:
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return method(path, *args, **options)

        return call

    for name in ("unlink", "open"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name)))
    mspc.export(older, "dense", mounted, verify=False, progress=False)
    with pytest.raises(
        StorageError, match=r"is complete, but .*volume\.verification\.npz next to it cannot be changed"
    ):
        mspc.export(older, "dense", mounted, overwrite=True, reference=True, progress=False)
    assert mspc.verify(mounted, older, progress=False)


@pytest.mark.parametrize("call", range(1, 40, 4))
def test_killed_while_a_mount_point_is_replaced(call, llama, recipe, older, newer, mounted, tmp_path):
    """Whole is what the next run finds: the older, or the new one."""
    shutil.copytree(older, mounted, dirs_exist_ok=True)
    killed_at(call, Path, "rename", lambda: run(llama, recipe, mounted, overwrite=True))
    recover(mounted)
    unfinished = tmp_path / "unfinished"  # what a run that was cut off has written so far
    if sibling(mounted, "new").is_dir():
        shutil.copytree(sibling(mounted, "new"), unfinished)
        shutil.rmtree(sibling(mounted, "new"))
    assert content(mounted) in (content(older), newer)
    if unfinished.is_dir():
        shutil.copytree(unfinished, sibling(mounted, "new"))
    with suppress(InputError):  # nothing was begun yet
        run(llama, recipe, mounted, resume=True)
    run(llama, recipe, mounted, overwrite=True)
    assert content(mounted) == newer


def test_a_result_that_cannot_be_moved_is_not_deleted(llama, recipe, older, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(older, out)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == ".out.new":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match=r"complete in .*\.out\.new"):
        run(llama, recipe, out, overwrite=True)
    with pytest.raises(InputError, match=r"\.out\.new holds a finished artifact.*--resume"):
        run(llama, recipe, out, overwrite=True)
    monkeypatch.undo()
    run(llama, recipe, out, resume=True)
    assert (out / MANIFEST).is_file()
    assert names(tmp_path) == ["out"]
