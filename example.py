"""Read a folder in the background: hashes, word counts, and some bad luck.

    python example.py [FOLDER]                    work until all is done, show a table
    python pybgworker.py run --app example        the same tasks, served for good
"""

import ctypes
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pybgworker import AsyncResult, TaskFailed, cron, current_task, task


@task
def sha256(path):
    """Hash a file; no memory to speak of, whatever its size."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()[:16]


@task
def count_words(path):
    """Count the words of a text file."""
    return len(Path(path).read_text(errors="replace").split())


@task(retries=3, retry_delay=0.2, retry_for=(ConnectionError,))
def fetch_prices():
    """Fails twice, as servers do, then works: see the log."""
    if current_task().attempt < 3:
        raise ConnectionError("the server hung up")
    return f"42.00 at attempt {current_task().attempt}"


@task(retries=0)
def crash():
    """A segfault takes one child with it, and nothing else."""
    ctypes.string_at(0)


@task(rate_limit="5/s")
def call_api(number):
    """At most five a second, over all workers."""
    return f"called {number}"


@task
@cron("*/1 * * * *")
def heartbeat():
    """Every minute, once, however many workers there are."""
    print("alive")


def enqueue(folder) -> list[tuple[str, AsyncResult]]:
    """Enqueue all there is to do; return a label and a handle for each."""
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())[:5]
    jobs = []
    for path in files:
        jobs.append((f"sha256 {path.name}", sha256.delay(str(path))))
        jobs.append((f"words {path.name}", count_words.delay(str(path))))
    jobs += [(f"call_api {n}", call_api.delay(n)) for n in range(3)]
    jobs += [("fetch_prices", fetch_prices.delay()), ("crash", crash.delay())]
    return jobs


def outcome(result) -> str:
    """What became of a task, in one line."""
    try:
        return str(result.get(timeout=30))
    except TaskFailed as failed:
        return str(failed.error)


def main():
    here = Path(__file__).resolve().parent
    folder = sys.argv[1] if len(sys.argv) > 1 else here
    with tempfile.TemporaryDirectory() as scratch:
        db = os.path.abspath(os.environ.get("PYBGWORKER_DB") or f"{scratch}/example.db")
        os.environ["PYBGWORKER_DB"] = db
        jobs = enqueue(folder)
        command = [sys.executable, "pybgworker.py", "run", "--app", "example"]
        with open(Path(scratch, "example.log"), "w") as log:
            worker = subprocess.Popen([*command, "--db", db], cwd=here, stdout=log)
        try:
            rows = [(label, outcome(result), result.status) for label, result in jobs]
        finally:
            worker.terminate()
            worker.wait()
    width = max(len(label) for label, _, _ in rows)
    for label, text, status in rows:
        print(f"{label:<{width}}  {status:<8}  {text}")


if __name__ == "__main__":
    main()
