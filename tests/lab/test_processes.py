"""Several processes as one run: torchrun on the CPU, as a user calls it, and the shards that ranks compute."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from lab import checkpoint
from lab.checkpoint import saved_steps
from lab.cli import UserError
from lab.distributed import World, own_gpu

AUGMENTED = ["training.accumulation=7", "network.augment_dim=9", "data.augment_probability=0.5"]
IMPORTANCE = ["preconditioning.formulation=improved_ddpm", "loss.objective=hybrid", "loss.noise_distribution=importance"]
IMPORTANCE += ["loss.weighting=iddpm", "chain.betas=cosine", "chain.num_timesteps=2"]
PLAIN = ["network.dropout=0", "--batch_size", "7", "--num_training_steps", "8", "--save_and_sample_every_n", "4"]
PLAIN += ["ema.snapshot_every_n=4"]
RUNS = {
    "augmented": [*PLAIN, *AUGMENTED],
    "importance": [*PLAIN, *IMPORTANCE],
    "failing": ["--resume_from", "none.pt"],
    "stopped": ["--num_training_steps", "1000000"],
}

DRIVER = """
import contextlib, os, signal, sys, torch
import train_mnist
from lab import pictures
from lab.cli import UserError, run_script
from lab.distributed import distributed
from lab.learner import Learner

def main():
    with distributed("cpu") as joined:
        world = joined[1]
        assert world.common_precision([torch.bfloat16, torch.float16][world.rank]) == torch.float16
        train_mnist.distributed = lambda device: contextlib.nullcontext(joined)
        for output, arguments in RUNS.items():
            sys.argv = ["train_mnist.py", "--config_path", "tiny.yaml", "--output_dir", f"two/{output}", *arguments]
            try:
                train_mnist.main()
            except (UserError, SystemExit) as error:
                if output != "failing":
                    raise
                os.write(2, f"rank {os.environ['RANK']} fails: {error!r}\\n".encode())  # in one piece

optimizer_step = Learner.optimizer_step

def step(learner, images_seen):
    if images_seen == 5 * learner.config.training.batch_size and os.environ["RANK"] == "1":
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if "two/stopped" in sys.argv:
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun, which tells all its workers
    optimizer_step(learner, images_seen)

Learner.optimizer_step = step
torch.set_default_dtype(torch.float64)
pictures.save_loss_curve = lambda path, *losses: path.write_bytes(b"a curve")
run_script(main)
"""


def test_two_processes_are_one_run_that_survives_a_crash_and_stops_as_one(start, train, tiny, tmp_path, steps_recorded):
    """One torchrun, in which a rank is killed at the fifth step of the first run; only dropout differs between ranks.

    The first run computes shards of 3 and 4 images, one image at a time, augmented. In the second, what all ranks learn decides
    which timesteps are drawn. An error of rank 0 ends the third. A signal to torchrun stops the last.
    """
    (tmp_path / "driver.py").write_text(DRIVER.replace("RUNS", repr(RUNS)))
    pair = start(tmp_path / "driver.py", torchrun=2, options=("--max_restarts=1",))
    torch.set_default_dtype(torch.float64)  # in which 1e-10 is far above all rounding
    try:
        ones = [train(tiny, *RUNS[output], output=output) for output in ("augmented", "importance")]
    finally:
        torch.set_default_dtype(torch.float32)
    out, err = pair.communicate(timeout=300)

    assert err.count("process 0 of 2 has lost the others") == err.count("error: ") == 1, err
    crashed, stopped = (tmp_path / "two" / name / "image/image_folder/tiny" for name in ("augmented", "stopped"))
    assert f"Going on from {crashed.relative_to(tmp_path) / 'diffusion-4.pt'}\n" in out
    assert out.count("Done: ") == 2, err
    assert out.count(" on 2 x cpu in ") == 4  # the first run, twice; the second; the last
    for one in ones:
        two = tmp_path / "two" / one.relative_to(tmp_path)
        ours, theirs = (checkpoint.load(run / "diffusion-8.pt") for run in (two, one))
        for part in ("losses", "net", "ema", "power_ema", "noise_distribution"):
            torch.testing.assert_close(ours[part], theirs[part], rtol=1e-8, atol=1e-10, equal_nan=True)
        grids = [pil_to_tensor(Image.open(run / "sample-8.png")).int() for run in (two, one)]
        assert (grids[0] - grids[1]).abs().max() <= 1
        assert steps_recorded(two) == list(range(1, 9))
        assert saved_steps(two, "snapshot") == [4, 8]
    assert theirs["noise_distribution"]["history"].isfinite().all()

    assert err.count("rank 0 fails: UserError('there is no checkpoint none.pt')\n") == 1, err
    assert err.count("rank 1 fails: SystemExit(2)\n") == 1, err

    assert pair.returncode != 0  # torchrun's own code for a signal
    assert out.count("Stopped after step") == 1
    assert "torchrun --nproc_per_node=2 " in out
    steps = steps_recorded(stopped)
    assert steps == list(range(1, len(steps) + 1))
    assert saved_steps(stopped)[-1] == len(steps) >= 5


def test_shards_are_a_partition_of_the_batch(train, tiny):
    for size, count in ((1, 5), (2, 2), (2, 7), (3, 7), (3, 9), (7, 19)):
        shards = [range(count)[World(rank, size).shard(count)] for rank in range(size)]
        assert [place for shard in shards for place in shard] == list(range(count))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1
    with pytest.raises(UserError, match="4 images cannot be divided between 8 processes"):
        train(tiny, world=World(0, 8))


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    current = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: [])
    monkeypatch.setattr("torch.cuda.set_device", current.append)
    assert [own_gpu("cuda", local_rank=1, local_size=2)] == current == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="3 processes are more than this machine's 2 GPUs"):
        own_gpu(None, local_rank=0, local_size=3)
    with pytest.raises(UserError, match="every process needs its own GPU, so not all can use 'cuda:1'"):
        own_gpu("cuda:1", local_rank=0, local_size=2)
