"""Everything that is owed on a GPU, in steps of at most nine minutes: tests, parity, races.

    benchmarks/on_gpu.sh            # sets up .venv, then runs this
    python -m benchmarks.on_gpu --dry

A step that ran leaves NAME.md in results/on_gpu/DEVICE and is not run again; delete the file to
repeat it. One that fails or takes too long leaves NAME.failed, and the next begins. --dry goes
through all of them at toy sizes on a CPU and keeps nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from looped_jax import files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "on_gpu"
SECONDS = 540  # of one step, at most
TESTS_FAILED = 1  # pytest's exit code where tests ran and some failed
TOY = (
    "--config.model.layers=1 --config.model.width=32 --config.model.loops=2 "
    "--config.model.seq_len=32 --config.train.batch_size=2 --config.train.tokens_per_step=64 "
    "--config.train.eval_tokens=256 --config.train.eval_loops=1,2"
)


@dataclass(frozen=True)
class Step:
    """module and its arguments, real or toy; {out} stands for the folder of results.

    environment: what it is run with beside; may_fail: what happens is the result
    """

    name: str
    module: str
    real: str
    toy: str
    environment: tuple[tuple[str, str], ...] = ()
    may_fail: bool = False


PAPER = "--layers 6 --width 384 --dtype bfloat16"
BREAKDOWN_TOY = (
    "--layers 1 --width 64 --loops 2 --seq_len 64 --batch_size 2 --vocab_size 512 --rounds 1"
)
STEPS = (
    Step("goldens", "pytest", "tests/model/test_transformer.py -k golden",
         "tests/model/test_transformer.py -k 'golden_losses_and_gradients and K3_END'"),
    Step("kernels", "pytest", "tests/model/test_attention_kernels.py",
         "tests/model/test_attention_kernels.py"),
    Step("decoding_is_the_forward_pass", "pytest", "tests/model/test_kv_cache.py -m 'not slow'",
         "tests/model/test_kv_cache.py -m 'not slow' -k 'full_forward and SL'"),
    Step("resume_deterministic", "pytest", "tests/training/test_resumption.py -m 'not slow'",
         "tests/training/test_resumption.py -m 'not slow' -k names",
         (("XLA_FLAGS", "--xla_gpu_deterministic_ops=true"),)),
    Step("resume_as_it_is", "pytest", "tests/training/test_resumption.py -m 'not slow'",
         "tests/training/test_resumption.py -m 'not slow' -k names", may_fail=True),
    Step("parity_float32", "torch_ref.compare",
         "--config flt:tiny --steps 50 --out {out}/parity_float32",
         f"--config flt:tiny --steps 2 --out {{out}}/parity_float32 {TOY}"),
    Step("parity_bfloat16", "torch_ref.compare",
         "--config flt:tiny --steps 50 --out {out}/parity_bfloat16 --config.model.dtype=bfloat16",
         f"--config flt:tiny --steps 2 --out {{out}}/parity_bfloat16 {TOY} "
         "--config.model.dtype=bfloat16"),
    *(
        Step(f"race_{size}", "benchmarks.race", f"--rounds 5 --sizes {size}",
             "--rounds 1 --sizes toy --no-memory")
        for size in ("L6_K12", "L12_K12", "L12_K3", "wide")
    ),
    Step("breakdown", "benchmarks.breakdown",
         f"--out {{out}}/breakdown {PAPER} --loops 12 --seq_len 1024 --batch_size 8 "
         "--vocab_size 151669", f"--out {{out}}/breakdown {BREAKDOWN_TOY}"),
    Step("breakdown_wide", "benchmarks.breakdown",
         "--out {out}/breakdown_wide --layers 6 --width 1536 --dtype bfloat16 --loops 4 "
         "--seq_len 1024 --batch_size 8 --vocab_size 151669",
         f"--out {{out}}/breakdown_wide {BREAKDOWN_TOY}"),
    Step("remat", "benchmarks.loops",
         f"{PAPER} --loops 1,4,12 --seq_len 1024 --batch_size 8 --vocab_size 32768",
         "--loops 1,2 --layers 1 --width 64 --seq_len 64 --batch_size 2 --vocab_size 512 "
         "--rounds 1"),
    Step("head", "benchmarks.head", "--tokens 8192 --chunks 512,1024,2048,4096 --dtype bfloat16",
         "--tokens 256 --chunks 128 --vocab_size 512 --width 64 --rounds 1"),
    Step("decoding", "benchmarks.decoding",
         f"{PAPER} --prompt 512 --tokens 128 --vocab_size 151669",
         "--layers 1 --width 64 --prompt 16 --tokens 4 --loops 1,2 --vocab_size 512 --rounds 1"),
    Step("evaluation", "benchmarks.evaluation", f"{PAPER} --seq_len 1024 --vocab_size 32768",
         "--layers 1 --width 64 --seq_len 64 --loops 1,2 --vocab_size 512 --rounds 1"),
)  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("steps", nargs="*", help="names, or how they begin; by default all")
    flags.add_argument("--dry", action="store_true", help="toy sizes on a CPU, nothing is kept")
    args = flags.parse_args()
    chosen = [s for s in STEPS if not args.steps or s.name.startswith(tuple(args.steps))]
    unknown = [begin for begin in args.steps if not any(s.name.startswith(begin) for s in STEPS)]
    if unknown:
        known = ", ".join(step.name for step in STEPS)
        flags.error(f"no step is called {unknown[0]!r}; known: {known}")
    if args.dry:  # steps that differ in their real sizes alone are tried once
        chosen = list({(step.module, step.toy): step for step in chosen}.values())
    with tempfile.TemporaryDirectory() as toys:
        out = Path(toys) if args.dry else RESULTS / device()
        out.mkdir(parents=True, exist_ok=True)
        done = [take(step, out, dry=args.dry) for step in chosen]
    sys.exit(0 if all(done) else 1)


def device() -> str:
    """The GPU's name as a folder's, as its driver has it; ends the program where there is none."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        sys.exit("error: no NVIDIA GPU is here; --dry tries the steps on a CPU")
    return re.sub(r"\W+", "_", said.splitlines()[0].strip())


def take(step: Step, out: Path, *, dry: bool) -> bool:
    """Run a step that has no result yet; whether it has one now."""
    result, failure = out / f"{step.name}.md", out / f"{step.name}.failed"
    if result.exists():
        print(f"{step.name}: done before, {result}", flush=True)
        return True
    given = [word.format(out=out) for word in shlex.split(step.toy if dry else step.real)]
    command = ["python", "-m", step.module, *given]
    environment = os.environ | dict(step.environment)
    environment["JAX_PLATFORMS"] = "cpu" if dry else "cuda"
    if dry:
        environment.pop("XLA_FLAGS", None)  # of GPUs, which another platform may not know
    print(f"{step.name} ...", flush=True)
    began = time.monotonic()
    code, said = run([sys.executable, *command[1:]], environment)
    took = f"{time.monotonic() - began:.0f} s"
    settings = "".join(f"{name}={value} " for name, value in step.environment)
    text = f"`{settings}{shlex.join(command)}`, {took}, exit code {code}\n\n{versions()}\n\n{said}"
    ran = step.module != "pytest" or re.search(r"\b\d+ passed", said)
    if ran and (code == 0 or step.may_fail and code == TESTS_FAILED):
        failure.unlink(missing_ok=True)
        files.write_text(result, text)
        print(f"{step.name}: {took}", flush=True)
        return True
    files.write_text(failure, text)
    why = f"more than {SECONDS} s" if code is None else f"exit code {code}"
    why += "" if ran else ", no test passed"
    print(f"{step.name}: FAILED after {took} ({why}), see {failure}", file=sys.stderr, flush=True)
    if dry:
        print("\n".join(said.splitlines()[-5:]), file=sys.stderr, flush=True)
    return False


def run(command: list[str], environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit code and output; None for one that took too long, and ended with all it had started."""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=SECONDS)
            return process.returncode, said
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        except BaseException:  # Ctrl-C, which a session of its own does not hear
            os.killpg(process.pid, signal.SIGKILL)
            raise


def versions() -> str:
    """Of what a number depends on, without starting any of it."""
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"{package} –"

    packages = ("jax", "jaxlib", "flax", "optax", "torch", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        driver = "no GPU"
    return f"{driver}; commit {commit}; Python {sys.version.split()[0]}; " + ", ".join(
        map(of, packages)
    )


if __name__ == "__main__":
    main()
