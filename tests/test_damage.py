"""What strangers and broken disks hand in: recognised, in one line, in little memory, and nothing runs."""

import io
import pickle
import random
import subprocess
import sys
import time
import zipfile
import zlib

import pytest
import torch
import yaml
from conftest import ROOT, write_config

from edm import checkpoint
from edm import config as configs
from edm.data import open_dataset
from edm.errors import UserError, brief
from edm.generate import MAX_PARAMETERS, build_denoiser
from edm.learner import Learner
from edm.runfolder import RunFolder
from edm.training import resume

CPU = torch.device("cpu")


@pytest.fixture
def tiny(tmp_path, image_folder):
    return write_config(tmp_path, image_folder, channels=3)


@pytest.fixture
def trained(tiny, tmp_path):
    """A training checkpoint, and its contents."""
    config = configs.load(tiny)
    learner = Learner(config, CPU)
    images = torch.zeros(4, config.data.channels, 8, 8, dtype=torch.uint8)
    losses = [learner.step(images, torch.zeros(4, dtype=torch.int64), step)[0].item() for step in (1, 2)]
    contents = {"step": 2, "name": "tiny", "config": config.to_dict(), **learner.state_dict(), "losses": torch.tensor(losses)}
    checkpoint.write(tmp_path / "diffusion-2.pt", contents)
    return tmp_path / "diffusion-2.pt", contents


def test_damaged_bytes_are_recognised_wherever_they_are(trained):
    """In the weights, and in the padding and directory, which the archive's own checksums leave out."""
    path, contents = trained
    data, rng = path.read_bytes(), random.Random(0)
    assert torch.equal(checkpoint.read(path)["losses"], contents["losses"])
    places = {0, 1, 30, 60, len(data) - 1, len(data) - 5, len(data) - 15, len(data) - 17, len(data) - 20, len(data) - 38}
    places |= {rng.randrange(len(data)) for _ in range(40)} | {len(data) - rng.randrange(2000) for _ in range(20)}
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged, or not a checkpoint"):
            checkpoint.read(path)
    for length in {0, 1, 21, 22, len(data) - 1, len(data) - 2, len(data) - 16} | {rng.randrange(len(data)) for _ in range(30)}:
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="is damaged, or not a checkpoint"):
            checkpoint.read(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


def wrong_contents(contents: dict) -> list[dict]:
    """Training checkpoints in each of which one thing is of a wrong type or shape."""
    name = next(iter(contents["net"]))
    moments = contents["optimizer"]
    wrong = [{**contents, "step": step} for step in (-1, "2", None, 2.0, True, [2])]
    wrong += [{**contents, "name": other} for other in (None, 3, "", "..", "a/b", "a\0b", "a\nb")]
    wrong += [{**contents, "config": other} for other in (None, [], {"data": 3}, {"network": {"dropout": "much"}}, {3: {}})]
    for key in ("net", "ema"):
        wrong += [{**contents, key: other} for other in (None, [], {}, {name: 3}, {**contents[key], name: torch.zeros(3)})]
        wrong += [{**contents, key: {**contents[key], name: contents[key][name].long()}}]
    wrong += [{**contents, "optimizer": other} for other in (None, [], {}, {0: moments[0]}, {**moments, 0: None})]
    for other in (None, 3, torch.zeros(3), torch.zeros(3, 1, 3, 3, dtype=torch.int64)):
        wrong.append({**contents, "optimizer": {**moments, 0: {**moments[0], "exp_avg": other}}})
    wrong += [{**contents, "optimizer": {**moments, 0: {**moments[0], "step": other}}} for other in (None, 2, torch.zeros(2))]
    huge = torch.zeros(1).expand(500_000_000)  # a file of some bytes
    wrong += [{**contents, "optimizer": {**moments, 0: {**moments[0], "max_exp_avg_sq": huge}}}]
    wrong += [{**contents, "optimizer": {**moments, 9999: moments[0]}}]
    wrong += [{**contents, "scaler": other} for other in (None, [1], {"scale": "x"}, {"scale": torch.zeros(2)})]
    wrong += [{**contents, "compiled": other} for other in (None, 1, "true")]
    wrong += [
        {**contents, "losses": other} for other in (None, 3, [1.0, 2.0], torch.zeros(3), torch.zeros(1, 2), torch.tensor(5.0))
    ]
    return wrong


def test_wrong_types_are_recognised_and_the_checkpoint_before_is_used(trained, tiny, capsys):
    path, contents = trained
    wrong = wrong_contents(contents)
    assert len(wrong) > 40
    learner = Learner(configs.load(tiny), CPU)
    for number, damaged in enumerate(wrong):
        checkpoint.write(path.with_name("diffusion-3.pt"), damaged)
        learner.net.requires_grad_(False).apply(lambda module: [p.zero_() for p in module.parameters()])
        resume(learner, RunFolder(path.parent, learner.processes), "latest")
        out = capsys.readouterr().out
        assert out.count("; trying the one before it\n") == 1, (number, out)
        assert out.count("\n") == 2
        assert out.endswith(f"Going on from {path}\n")
        assert all(torch.equal(tensor, contents["net"][name]) for name, tensor in learner.net.state_dict().items())


def archive_of(value: object, path, method=zipfile.ZIP_STORED, replace=lambda data: data) -> None:
    """A file of torch.save's, its parts packed by another method, or with another pickle."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w", method) as target:
        for part in source.infolist():
            data = source.read(part)
            target.writestr(part.filename, replace(data) if part.filename.endswith("data.pkl") else data)


class Bytes:
    def __reduce__(self):
        return bytearray, (3_000_000_000,)


def hostile(kind: str, path) -> None:
    if kind == "packed zeros":
        archive_of({"ema": {"x": torch.zeros(50_000_000)}}, path, zipfile.ZIP_DEFLATED)
    elif kind == "claimed bytes":
        archive_of({}, path, replace=lambda data: pickle.dumps(Bytes(), protocol=2))
    elif kind == "claimed storage":  # 4 numbers that say they are 2 billion
        archive_of({"ema": {"x": torch.zeros(260)}}, path, replace=lambda d: d.replace(b"M\x04\x01", b"J\x00\x00\x00\x77"))
    elif kind == "nested":
        value = ["x"]
        for _ in range(60):
            value = [value, value]
        torch.save({"step": value, "name": "x", "config": {"data": value}, "ema": {}}, path)
    elif kind == "claimed bytearray of a pickle":
        path.write_bytes(b"\x80\x05\x96" + (3_000_000_000).to_bytes(8, "little") + b".")
    elif kind == "claimed frame":
        path.write_bytes(b"\x80\x05\x95" + (2**40).to_bytes(8, "little") + b".")


KINDS = ["packed zeros", "claimed bytes", "claimed storage", "nested", "claimed bytearray of a pickle", "claimed frame"]
READ_ALL = """
import resource, sys
from edm import checkpoint
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        checkpoint.read(path)
    except checkpoint.UserError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


def test_hostile_checkpoints_take_no_memory(tmp_path):
    """In a process of its own, since what counts is the most memory that it ever had."""
    paths = [tmp_path / f"{kind}.pt" for kind in KINDS]
    for kind, path in zip(KINDS, paths):
        hostile(kind, path)
    call = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    lines = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(KINDS)
    for line, path in zip(lines, paths):
        kilobytes, _, message = line.partition(" ")
        assert message.startswith(f"{path} is ")
        assert int(kilobytes) < 100_000, line


def test_a_network_beyond_all_machines_is_refused_before_it_is_made():
    """By a config, and by a checkpoint's, whose weights do not bear it out."""
    huge = {"model_channels": 2048, "channel_mult": [64, 64, 64], "num_blocks": 64}
    config = configs.from_dict({"network": huge}, "x", "x")
    with pytest.raises(UserError, match=r"network: [\d,]+ parameters are more than the 1,000,000,000 allowed"):
        build_denoiser(config)
    large = configs.from_dict({"network": {"model_channels": 512, "channel_mult": [1, 1, 2]}}, "x", "x")
    with torch.device("meta"):
        count = sum(p.numel() for p in build_denoiser(large).parameters())
    assert 0.1 * MAX_PARAMETERS < count < MAX_PARAMETERS
    began = time.monotonic()
    with pytest.raises(UserError, match="of another network than the config's: model"):
        build_denoiser(large, {"weight": torch.zeros(3)}, "x.pt")
    assert time.monotonic() - began < 1  # initialising its weights would take many seconds


@pytest.mark.filterwarnings("ignore:Image size")  # which pytest would show
def test_an_image_of_too_many_pixels_is_refused(tmp_path):
    """100,000 x 100,000, and 10,000 x 10,000, of which the file need only say so."""
    for side in (100_000, 10_000):
        header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
        png = b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + zlib.crc32(header).to_bytes(4, "big")
        bmp = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little") + side.to_bytes(4, "little") * 2
        bmp += b"\1\0\x18\0" + bytes(24)
        for name, data in {"bomb.png": png + b"\0\0\0\0IDAT\x35\xaf\x06\x1e", "bomb.bmp": bmp}.items():
            (tmp_path / "images").mkdir(exist_ok=True)
            (tmp_path / "images" / name).write_bytes(data)
            with pytest.raises(UserError, match=rf"cannot read the image .*{name}: Image size \({side**2} pixels\) exceeds"):
                open_dataset("image_folder", str(tmp_path / "images"), 8, 1, 0)[0]
            (tmp_path / "images" / name).unlink()


def test_an_image_of_a_format_that_could_run_code_is_not_opened(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(bomb) run\n")
    with pytest.raises(UserError, match=r"cannot read the image .*x\.png: cannot identify image file"):
        open_dataset("image_folder", str(tmp_path), 8, 1, 0)[0]


def test_a_config_does_not_say_where_to_download_to(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for root in (str(tmp_path / "elsewhere"), "../elsewhere"):
        with pytest.raises(UserError, match=r"from '.*elsewhere' nor downloaded \(only a folder inside"):
            open_dataset("mnist", root, 32, 1, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def damaged_configs() -> list[str]:
    """YAML texts, each of them edm.yaml with one thing wrong."""
    text = (ROOT / "configs/edm.yaml").read_text()
    values = yaml.safe_load(text)
    damaged = []
    for section, entries in values.items():
        for key, value in entries.items():
            line = next(line for line in text.splitlines() if line.startswith(f"  {key}:"))
            wrong = ["{a: 1}", "[[1]]", "-1.5e99", "!!python/name:os.system", "*x"]
            numbers = [".nan", "'12'", "true", "9" * 400, "-" + "9" * 400, "1:" * 180 + "1.5", "0x10", "2024-01-01"]
            wrong += numbers if not isinstance(value, str | bool) else ["[a]", "''", "7"]
            damaged += [text.replace(line, f"  {key}: {bad}") for bad in wrong]
            damaged += [text.replace(line, f"  {key}x: 1"), text.replace(line, f"{line}\n{line}"), text.replace(line, line[2:])]
        damaged += [text.replace(f"{section}:", f"{section}s:"), text.replace(f"{section}:", f"{section}: 3\nx:")]
    rng = random.Random(0)
    damaged += [text[:place] + "\0" + text[place:] for place in (rng.randrange(len(text)) for _ in range(20))]
    damaged += [
        text.replace("\n", "\n\t", 3),
        "a: &a [1]\n" * 2,
        "[" * 5000,
        "- 1",
        "just words",
        "{",
        "data: {",
        "\ufeff\ufeffx",
    ]
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    return [*damaged, bomb, "x" * 2_000_000, "data: {" + ", ".join(f"k{n}: 1" for n in range(50_000)) + "}"]


def test_every_damaged_config_ends_in_one_line(script, tmp_path):
    configs = damaged_configs()
    assert len(configs) >= 200
    for text in configs:
        (tmp_path / "bad.yaml").write_text(text)
        code, out, err = script("train_mnist.py", "--config_path", "bad.yaml")
        assert code == 2, text[:2000]
        assert err.startswith("error: bad.yaml"), (err, text[:2000])
        assert err.count("\n") == 1
        assert len(err) < 1100
        assert not out
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert script("train_mnist.py", "--config_path", "bad.yaml")[0] == 2
    assert (
        "/dev/zero is no config: it has more than 1,000,000 bytes" in script("train_mnist.py", "--config_path", "/dev/zero")[2]
    )


def test_values_are_shown_in_brief():
    value = ["x"]
    for _ in range(100):
        value = [value, value]
    for other in (value, "x" * 10**6, 10**5000, {"a": value}, "a\nb", None, True):
        assert len(brief(other)) <= 60
        assert "\n" not in brief(other)


def test_messages_do_not_move_the_cursor(tmp_path):
    call = [sys.executable, str(ROOT / "sample.py"), "--checkpoint", "\x1b[2J\nx.pt", "--device", "cpu"]
    result = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: there is no checkpoint ?[2J x.pt")
    assert result.stderr.count("\n") == 1
