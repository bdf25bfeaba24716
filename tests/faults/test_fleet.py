"""The fleet as a whole: where it listens, what its actors can import, and what its end looks like."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kvsluice.client import Client
from kvsluice.errors import WorkerLost
from kvsluice.evals.service_process import running_service
from kvsluice.services.processes import Process, descendants, wait_gone

ROOT = Path(__file__).resolve().parents[2]
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def listening(processes: list[Process]) -> set[str]:
    """Addresses, as /proc/net shows them, on which any of these processes listens for TCP."""
    inodes = set()
    for process in processes:
        folder = Path(f"/proc/{process.pid}/fd")
        for entry in os.listdir(folder):
            try:
                target = os.readlink(folder / entry)
            except OSError:
                continue
            inodes.add(target.removeprefix("socket:[").rstrip("]"))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].rpartition(":")[0])
    return found


@pytest.mark.parametrize("part", ["ray::Controller", "gcs_server"])
def test_both_roles_in_one_worker_and_the_end_of_the_service(part):
    from_scratch = ("--role", "both", "--model", "smollm2-135m", "--random-weights", "--seed", "3")
    with running_service(*from_scratch) as service, Client(service.address, timeout_s=60.0) as client:
        tree = descendants(service.process.pid)
        assert listening([*tree]) <= LOOPBACK
        done = client.generate(list(range(100, 1600)), recipe="balanced", max_tokens=3, ignore_eos=True)
        assert done.recipe.effective == "sluice"
        assert 0 < done.recipe.handoff_bytes < done.recipe.handoff_bf16_bytes

        stream = client.stream("A story:", max_tokens=2000, ignore_eos=True)
        next(stream)
        victims = [p for p in tree if part in Path(f"/proc/{p.pid}/cmdline").read_text().replace("\0", " ")]
        os.kill(victims[0].pid, 9)
        with pytest.raises(WorkerLost):
            for _ in stream:
                pass
        assert service.process.wait(60) == 1
        line = next(line for line in service.log_tail().splitlines() if "the service stops" in line)
        assert line in (
            "kvsluice: the controller is gone; the service stops",
            "kvsluice: Ray's gcs_server is gone; the service stops",
        )
        assert wait_gone(tree, 5.0) == []


def test_a_lost_worker_of_both_roles_and_a_second_signal():
    arguments = ("--role", "both", "--model", "smollm2-135m", "--random-weights", "--seed", "3")
    with running_service(*arguments) as service, Client(service.address, timeout_s=60.0) as client:
        while "(1 worker of both roles)" not in service.log_tail():
            time.sleep(0.05)
        tree = descendants(service.process.pid)
        (raylet,) = [p for p in tree if p.name == "raylet"]
        folder = re.search(r"/[^ =]*/kvsluice-\w+", Path(f"/proc/{raylet.pid}/cmdline").read_text())[0]
        assert Path(folder).is_dir()
        stream = client.stream("A story:", max_tokens=60, ignore_eos=True)
        next(stream)
        (worker,) = [p for p in tree if "ray::CombinedWorker" in Path(f"/proc/{p.pid}/cmdline").read_text()]
        os.kill(worker.pid, 9)
        for _ in stream:
            pass
        assert len(stream.completion.token_ids) == 60
        assert stream.completion.durability.migrations == 1
        stream = client.stream("A story:", max_tokens=2000, ignore_eos=True)
        next(stream)

        tree = descendants(service.process.pid)
        service.process.send_signal(signal.SIGTERM)
        while "(signal again to stop now)" not in service.log_tail():
            time.sleep(0.05)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(30) == 130
        assert service.log_tail().endswith("kvsluice: stopped at once\n")
        assert wait_gone(tree, 5.0) == []
        assert not Path(folder).exists()


def test_a_broken_checkpoint_stops_the_start_with_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    done = serve("--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("kvsluice: ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--port", "70000"), "port"),
        (("--model", "no-such-model"), "no-such-model"),
        (("--default-recipe", "nope"), "default_recipe"),
        (("--max-num-seqs", "0"), "max_num_seqs"),
        (("--durability", "tokens"), "durability"),
    ],
)
def test_a_bad_setting_stops_the_start_and_is_named(arguments, named):
    done = serve(*arguments)
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_a_profile_that_does_not_fit_the_model_stops_the_start(tmp_path):
    """Which shows, too, that workers read the file that is named."""
    profile = tmp_path / "profile.json"
    profile.write_text('{"tsp_layer": 900}')
    done = serve("--profile", str(profile), "--port", "0", "--no-http")
    assert done.returncode == 1
    assert "profile: does not fit the model under sluice: " in done.stderr and "got 900" in done.stderr
    assert "Traceback" not in done.stderr


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "kvsluice.services.cli", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_ray_workers_find_no_top_level_kernels(tmp_path):
    script = """
        import tempfile
        from kvsluice.services.config import load_config
        from kvsluice.services.serve import prepare_environment

        prepare_environment()
        from kvsluice.services.cluster import start_ray

        with tempfile.TemporaryDirectory(prefix="kvsluice-") as folder:
            start_ray(load_config(), folder, 1)
            import ray

            @ray.remote
            def look():
                import importlib.util
                return [importlib.util.find_spec(name) is not None for name in ("kernels", "models", "kvsluice")]

            print(ray.get(look.remote()))
            ray.shutdown()
    """
    # without -P the repository root, from which this runs, is on the driver's own import path
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[False, False, True]", done.stderr
