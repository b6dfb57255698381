"""The launch scripts against stand-ins for gcloud, git, pip, srun, sbatch and scontrol, which note their calls."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

# What each command is told to answer lies in world.json: {kind: [exit code, or what `list` prints, ...]}, the last for
# good. kind is the verb of gcloud, its remote command's first word for ssh, or the program's own name.
STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
here = pathlib.Path(__file__).resolve().parent
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
kind = name
if name == "gcloud":
    assert arguments[:3] == ["compute", "tpus", "queued-resources"], arguments
    kind = arguments[3]
    if kind == "ssh":
        kind = "install" if "worker.sh install" in arguments[arguments.index("--command") + 1] else "run"
with (here / "calls.jsonl").open("a") as file:
    file.write(json.dumps([kind, name, *arguments]) + "\\n")
if name == "git":
    pathlib.Path(arguments[arguments.index("--output") + 1]).write_text("code")
world = json.loads((here / "world.json").read_text())
answers = world.get(kind, [0])
answer = answers.pop(0) if len(answers) > 1 else answers[0]
(here / "world.json").write_text(json.dumps(world))
if isinstance(answer, str):
    print(answer)
sys.exit(answer if isinstance(answer, int) else 0)
"""

PYTHON = f"""#!/bin/sh
if [ "$1" = -m ]; then exec "$(dirname "$0")/../../bin/pip" "$@"; fi
exec {sys.executable} "$@"
"""


class World:
    """A PATH of stand-ins, and the scripts run on it."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        for name in ("gcloud", "git", "pip", "srun", "sbatch", "scontrol"):
            self.program(folder / "bin" / name, STAND_IN)
        (folder / "venv" / "bin").mkdir(parents=True)
        self.program(folder / "venv" / "bin" / "python", PYTHON)
        self.environment = {
            "PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder), "VMOD_POLL": "0", "VMOD_VENV": f"{folder}/venv"
        }  # fmt: skip
        self.answers()

    @staticmethod
    def program(path, text):
        path.write_text(text)
        path.chmod(0o755)

    def answers(self, **answers):
        (self.folder / "bin" / "world.json").write_text(json.dumps(answers))

    def start(self, script, *arguments, **variables):
        command = ["bash", str(ROOT / "launch" / script), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment | variables, cwd=ROOT, **pipes)

    def run(self, script, *arguments, **variables):
        """(exit code, the last line, everything that was written)"""
        process = self.start(script, *arguments, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, (err.strip().splitlines() or [""])[-1], out + err

    def calls(self):
        """[[kind, program, argument, ...], ...], and forgets them."""
        path = self.folder / "bin" / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]


def wait_until(condition, process, seconds=30):
    """Until the condition holds; fails, with what was written, where the process ends before or takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"ended with {process.returncode} or waited too long: {process.communicate()}")
        time.sleep(0.05)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


TPU = ("run", "pod", "--zone", "us-west4-a", "--type", "v5litepod-16")
COMMAND = ("--", "vmod", "train", "--config", "configs/tiny.py", "--workdir", "~/bucket/it's here")
DELETE = "delete it: bash launch/tpu.sh delete pod --zone us-west4-a"
PREPARE = ["git", "scp", "install"]


def test_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, "-x", *map(str, SCRIPTS), str(ROOT / ".ci" / "run")], check=True, cwd=ROOT)


def test_tpu_from_create_to_delete_with_a_preemption(world):
    """The TPU goes while the command runs (ssh ends with 255): a new one is made, and the same command goes on."""
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"]
    world.answers(list=states, run=[255, 0])
    code, last, _ = world.run("tpu.sh", *TPU, "--spot", "--bucket", "mine", "--delete", *COMMAND)
    assert code == 0, last
    calls = world.calls()
    assert [call[0] for call in calls] == [
        "list", "create", "list", "list", "list", *PREPARE, "run",
        "list", "list", "list", "delete", "create", "list", *PREPARE, "run", "delete",
    ]  # fmt: skip
    head = ["gcloud", "compute", "tpus", "queued-resources"]
    zone = ["--zone", "us-west4-a"]
    by_kind = {call[0]: call[1:] for call in calls}
    assert by_kind["create"] == [
        *head, "create", "pod", "--accelerator-type", "v5litepod-16", "--runtime-version", "v2-alpha-tpuv5-lite",
        "--node-id", "pod", "--spot", *zone,
    ]  # fmt: skip
    assert by_kind["list"] == [*head, "list", "--filter", "name~/pod$", "--format", "value(state.state)", *zone]
    assert by_kind["git"][:4] == ["git", "archive", "--format", "tar.gz"]
    assert by_kind["git"][-1] == "HEAD"
    archive = by_kind["git"][5]
    assert by_kind["scp"] == [*head, "scp", archive, "pod:", "--node", "all", "--worker", "all", *zone]
    assert not Path(archive).exists()
    remote = [*head, "ssh", "pod", "--node", "all", "--worker", "all", "--command"]
    assert by_kind["install"][:10] == by_kind["run"][:10] == remote[:10]
    assert by_kind["install"][11].endswith("bash vmod/launch/tpu_worker.sh install mine")
    words = shlex.split(by_kind["run"][11])  # as the worker's shell reads it
    assert words == ["bash", "vmod/launch/tpu_worker.sh", "run", *COMMAND[1:]]
    assert by_kind["delete"] == [*head, "delete", "pod", "--force", "--quiet", *zone]


def test_tpu_that_is_there_is_used_and_stays(world):
    """75 from a TPU that is still there: the same command again, nothing is copied."""
    world.answers(list=["ACTIVE"], run=[75, 75, 0])
    code, last, _ = world.run("tpu.sh", *TPU, *COMMAND)
    assert code == 0
    assert [call[0] for call in world.calls()] == ["list", *PREPARE, "run", "list", "run", "list", "run"]
    assert "still costs" in last
    assert DELETE in last


def test_tpu_of_several_slices(world):
    world.answers(list=["", "ACTIVE"])
    assert world.run("tpu.sh", *TPU, "--slices", "2", "--version", "mine", *COMMAND)[0] == 0
    (create,) = [call for call in world.calls() if call[0] == "create"]
    assert create[6:] == [
        "pod", "--accelerator-type", "v5litepod-16", "--runtime-version", "mine",
        "--node-count", "2", "--node-prefix", "pod", "--zone", "us-west4-a",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "code", "message", "last_call"),
    [
        ({"list": [1]}, 1, "the state of pod could not be read", "list"),
        ({"list": ["", "ACTIVE"], "create": [1]}, 1, "creating pod failed", "create"),
        ({"list": ["", "PROVISIONING", 1]}, 1, "the state of pod could not be read", "list"),
        ({"list": ["", "FAILED"]}, 1, "pod is FAILED", "list"),
        ({"list": ["ACTIVE"], "git": [1]}, 1, "packing the code failed", "git"),
        ({"list": ["ACTIVE"], "scp": [1]}, 1, "copying the code to pod failed", "scp"),
        ({"list": ["ACTIVE"], "install": [1]}, 1, "installing on pod failed", "install"),
        ({"list": ["ACTIVE"], "run": [2]}, 2, "the command failed on pod with exit code 2", "list"),
        ({"list": ["ACTIVE"], "run": [255]}, 255, "the command failed on pod with exit code 255", "list"),
        ({"list": ["ACTIVE", "SUSPENDED"], "run": [75], "delete": [1]}, 1, "deleting pod failed", "delete"),
        ({"list": ["ACTIVE", ""], "run": [75], "create": [1]}, 1, "creating pod failed", "create"),
        ({"list": ["ACTIVE"], "delete": [1]}, 1, "deleting pod failed", "delete"),
    ],
)
def test_tpu_when_something_fails(world, answers, code, message, last_call):
    """One line says what, and how to delete; nothing more is called."""
    world.answers(**answers)
    got, last, _ = world.run("tpu.sh", *TPU, "--delete", *COMMAND)
    assert got == code
    assert last.startswith(f"tpu.sh: {message}. pod may still run and cost; ")
    assert last.endswith(DELETE)
    assert world.calls()[-1][0] == last_call


def test_tpu_interrupted(world):
    slow = STAND_IN.replace("sys.exit(answer if", "import time; time.sleep(3 * (kind == 'run')); sys.exit(answer if")
    world.program(world.folder / "bin" / "gcloud", slow)
    world.answers(list=["ACTIVE"])
    process = world.start("tpu.sh", *TPU, *COMMAND)
    calls = world.folder / "bin" / "calls.jsonl"
    wait_until(lambda: calls.exists() and '"run"' in calls.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    last = process.communicate()[1].strip().splitlines()[-1]
    assert last.startswith("tpu.sh: terminated.")
    assert last.endswith(DELETE)


def test_tpu_delete(world):
    assert world.run("tpu.sh", "delete", "pod", "--zone", "z")[0] == 0
    assert [call[5:] for call in world.calls()] == [["delete", "pod", "--force", "--quiet", "--zone", "z"]]
    world.answers(delete=[1])
    code, last, _ = world.run("tpu.sh", "delete", "pod", "--zone", "z")
    assert code == 1
    assert "deleting pod failed" in last


def test_tpu_dry_run(world):
    code, _, text = world.run("tpu.sh", *TPU, "--spot", "--delete", "--dry-run", *COMMAND)
    assert code == 0
    assert world.calls() == []
    verbs = [line.split()[5] for line in text.splitlines() if line.startswith("+ gcloud compute tpus queued-resources")]
    assert verbs == ["list", "create", "list", "scp", "ssh", "ssh", "delete"]
    assert "+ git archive" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say run or delete"),
        (("run",), "say which TPU"),
        (("run", "--zone", "z"), "say which TPU"),
        (("run", "pod", "--type", "v6e-8", "--", "x"), "--zone is missing"),
        (("run", "pod", "--zone"), "--zone needs a value"),
        (("run", "pod", "--zone", "z", "--", "x"), "--type is missing"),
        (("run", "pod", "--zone", "z", "--type", "v6e-8"), "the command is missing"),
        (("run", "pod", "--zone", "z", "--type", "v6e-8", "vmod"), "unknown option vmod"),
        (("run", "pod", "--zone", "z", "--type", "v9-8", "--", "x"), "--version is missing"),
        (("run", "pod", "--zone", "z", "--type", "v6e-8", "--slices", "two", "--", "x"), "--slices two is no number"),
    ],
)
def test_tpu_mistakes(world, arguments, message):
    code, last, _ = world.run("tpu.sh", *arguments)
    assert code == 2
    assert message in last
    assert world.calls() == []


def test_what_a_tpu_worker_runs(world):
    """The package is installed once; `run` gives the command's own arguments and exit code."""
    assert world.run("tpu_worker.sh", "install")[0] == 0
    (install,) = world.calls()
    assert install[1:5] == ["pip", "-m", "pip", "install"]
    assert install[-1] == ".[tpu]"
    code, _, out = world.run("tpu_worker.sh", "run", "sh", "-c", 'echo "$1"; exit 75', "-", "it's here")
    assert (code, out.strip()) == (75, "it's here")
    assert world.calls() == []
    world.answers(pip=[1])
    (world.folder / "venv" / ".vmod-tpu").unlink()
    assert world.run("tpu_worker.sh", "run", "true")[0] == 1


def test_gpu_runs_again_after_75(world):
    count = world.folder / "count"
    script = f'echo run >>{count}; if [ "$(wc -l <{count})" = 3 ]; then exit "$1"; fi; exit 75'
    for code in (0, 4):
        count.unlink(missing_ok=True)
        got, last, _ = world.run("gpu.sh", "sh", "-c", script, "-", f"{code}")
        assert got == code
        assert count.read_text() == "run\n" * 3
        assert (last == f"gpu.sh: the command failed with exit code {code}") == bool(code)
    assert [call[-1] for call in world.calls()] == [".[cuda]"]


def test_gpu_passes_sigterm_on_and_stops(world):
    """The command gets the time that it needs to save, and is not started again."""
    ready = world.folder / "ready"
    script = f"trap 'sleep 1; echo saved; exit 75' TERM; touch {ready}; while true; do sleep 0.1; done"
    process = world.start("gpu.sh", "bash", "-c", script)
    wait_until(ready.exists, process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert out.splitlines()[-1] == "saved"
    assert err.splitlines()[-1] == "gpu.sh: stopped and saved; the same command goes on"


def test_gpu_where_the_installation_fails(world):
    world.answers(pip=[1])
    assert world.run("gpu.sh", "touch", str(world.folder / "ran"))[0] != 0
    assert not (world.folder / "ran").exists()


def test_slurm(world):
    """Submitted by sbatch; in the job srun starts the tasks; 75 puts the job back into the queue."""
    command = ["vmod", "train", "--workdir", "it's here"]
    assert world.run("gpu.sh", "--slurm", "--nodes=2", "--time=1:00:00", "--", *command)[0] == 0
    assert world.calls() == [["sbatch", "sbatch", "--nodes=2", "--time=1:00:00", "launch/slurm.sh", *command]]
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    assert world.run("slurm.sh", *command, **job)[0] == 0
    assert [call[0] for call in world.calls()] == ["pip", "srun"]
    world.answers(srun=[75])
    assert world.run("slurm.sh", *command, **job)[0] == 75
    assert world.calls() == [["srun", "srun", *command], ["scontrol", "scontrol", "requeue", "7"]]


@pytest.mark.parametrize(
    ("answers", "code", "message"),
    [
        ({"srun": [3]}, 3, "gpu.sh: the command failed in job 7 with exit code 3; nothing of it runs any more"),
        ({"srun": [75], "scontrol": [1]}, 75, "slurm.sh: job 7 could not be requeued: submit it again"),
        ({"pip": [1]}, 1, ""),
    ],
)
def test_slurm_when_something_fails(world, answers, code, message):
    world.answers(**answers)
    got, last, _ = world.run("slurm.sh", "vmod", SLURM_SUBMIT_DIR=str(ROOT), SLURM_JOB_ID="7")
    assert got == code
    assert last.startswith(message)
    assert ("scontrol" in [call[0] for call in world.calls()]) == (code == 75)


def test_slurm_submission_fails(world):
    world.answers(sbatch=[1])
    code, last, _ = world.run("gpu.sh", "--slurm", "--nodes=2", "--", "vmod")
    assert (code, last) == (1, "gpu.sh: the job was not submitted")
    code, last, _ = world.run("gpu.sh", "--slurm", "--nodes=2")
    assert code == 2
    assert "the command is missing" in last
    assert world.run("gpu.sh")[0] == 2


@pytest.mark.parametrize("mode", ["here", "slurm", "job"])
def test_gpu_dry_run(world, mode):
    arguments = ("--slurm", "--nodes=2", "--", "vmod") if mode == "slurm" else ("vmod",)
    code, _, text = world.run("gpu.sh", "--dry-run", *arguments, **({"SLURM_JOB_ID": "7"} if mode == "job" else {}))
    assert code == 0
    assert world.calls() == []
    expected = {"here": "+ vmod", "slurm": "+ sbatch --nodes=2 launch/slurm.sh vmod", "job": "+ srun vmod"}[mode]
    assert expected in [line.strip() for line in text.splitlines()]


def test_tests_run_in_another_environment_as_it_is(world):
    """Nothing is installed, the checkout's package is found, and pytest's options are passed on."""
    note = f'#!/bin/sh\nprintf "%s " "$PYTHONPATH" "$@" >{world.folder}/said\n'
    world.program(world.folder / "other", note)
    assert world.run("test.sh", "--with", str(world.folder / "other"), "--all", "-k", "one two", PYTHONPATH="")[0] == 0
    assert (world.folder / "said").read_text() == f"{ROOT} -m pytest --all -k one two "
    assert world.calls() == []
    assert world.run("test.sh", "--with")[:2] == (2, "test.sh: --with needs a Python")
