"""The specification of pybgworker, as tests: python test_pybgworker.py

Nothing needs to be installed; pytest runs it too.  The blocks have the names and
the order of the sections of pybgworker.py, after "Promises" (what the README
guarantees, with real processes) and before "The file itself".  One behaviour for
each test; no sleeps where an event can be waited for; real SQLite, real children,
real SIGKILL.  PYBGWORKER_TORTURE=seconds makes the torture tests longer.

    python test_pybgworker.py [-j N] [CLASS | CLASS.TEST ...]

Several tests run at a time, N of them; -j 1 runs all in this process.
"""

from __future__ import annotations

import ast
import bisect
import collections
import contextlib
import copy
import datetime as dt
import importlib.util
import errno
import functools
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
from decimal import Decimal
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.dont_write_bytecode = True      # tests write a module anew within a second
sys.path.insert(0, str(HERE))

import pybgworker  # noqa: E402
from pybgworker import (  # noqa: E402
    App, AsyncResult, By, Cron, CronError, Filter, Log, NewTask, Outcome, Phase,
    RetryPolicy, Run, SqliteStore, Verdict, Worker,
)


# == Tools ====================================================================


def until(predicate, timeout=15.0, what="it"):
    """Wait until `predicate()` is true; return its value, or fail."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        found = predicate()
        if found:
            return found
        time.sleep(0.005)
    raise AssertionError(f"{what} did not happen within {timeout} s")


def clean_environment(**extra):
    """This process's environment without settings, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYBGWORKER_")}
    return {**kept, "PYTHONPATH": str(HERE), "PYTHONWARNINGS": "ignore", **extra}


def is_alive(pid):
    """True while a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return not Path("/proc/self/stat").exists()
    return stat.rpartition(")")[2].split()[0] != "Z"


class Case(unittest.TestCase):
    """A folder of its own, with a queue in it."""

    maxDiff = None

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="pybgworker-test-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)
        self.db = self.folder / "queue.db"
        self.app = App(db=str(self.db))
        self.addCleanup(lambda: self.app.store.close())
        self.now = 1_800_000_000_000        # a clock the test owns, unix ms

    @property
    def store(self):
        """The queue, with its file and tables made."""
        self.app.store.create()
        return self.app.store

    def sql(self, statement, *parameters):
        """Run a statement on a connection of its own; return the rows."""
        connection = sqlite3.connect(self.db, timeout=10)
        try:
            with connection:
                return connection.execute(statement, parameters).fetchall()
        finally:
            connection.close()

    def fill(self, count, queue="'default'", name="'t'"):
        """Queued tasks by the thousand; `queue` and `name` are SQL over the number i."""
        self.sql(f"""
            with recursive n (i) as (select 1 union all select i + 1 from n where i < ?)
            insert into bg_task (id, state, queue, name, priority, retries, run_at,
                created_at, args)
            select i + (select ifnull(max(id), 0) from bg_task), 2, {queue}, {name},
                5, 3, 0, 0, '[[],{{}}]' from n""", count)

    def python(self, code, *argv, check=True, timeout=60, **environment):
        """Run a program in the folder; return it when it has ended."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *argv], cwd=self.folder,
            env=clean_environment(PYBGWORKER_DB=str(self.db), **environment),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=timeout,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def cli(self, *argv, timeout=60, stdin=subprocess.DEVNULL, **environment):
        """Run a command of pybgworker.py in the folder."""
        return subprocess.run(
            [sys.executable, str(HERE / "pybgworker.py"), *map(str, argv)],
            cwd=self.folder, stdin=stdin,
            env=clean_environment(PYBGWORKER_DB=str(self.db), **environment),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=timeout,
        )

    def module(self, source, name="tasks"):
        """Write an app module into the folder; import it here with our database."""
        path = self.folder / f"{name}.py"
        path.write_text("from pybgworker import *\n" + textwrap.dedent(source))
        spec = pybgworker.importlib.util.spec_from_file_location(name, path)
        found = pybgworker.importlib.util.module_from_spec(spec)
        old = dict(pybgworker.default_app.tasks)
        pybgworker.default_app.tasks.clear()
        pybgworker.default_app.listeners.clear()
        pybgworker.configure(db=str(self.db))
        spec.loader.exec_module(found)
        self.addCleanup(pybgworker.default_app.tasks.update, old)
        self.addCleanup(pybgworker.default_app.tasks.clear)
        self.addCleanup(pybgworker.default_app.listeners.clear)
        return found

    def worker_here(self, log_to=None, **options):
        """A worker of our app in this process, driven by hand."""
        fd = os.open(os.devnull, os.O_WRONLY) if log_to is None else log_to
        return Worker(pybgworker.Registry.of(self.app, "tasks"), self.app.settings,
                      self.app.store, log=Log(fd), **options)

    def worker(self, *flags, app="tasks", before=None, **environment):
        """A worker in a process of its own; ended with the test.

        `before()` is called in that process, before it becomes the worker.
        """
        worker = RealWorker(self, app, flags, environment, before)
        self.addCleanup(worker.kill)
        return worker


class RealWorker:
    """`pybgworker.py run` in another process, and the events it has logged."""

    FIELDS_OF_ALL = {"timestamp", "event", "worker"}
    FIELDS = {*FIELDS_OF_ALL, "task_id", "name", "attempt"}     # of those of a run

    def __init__(self, case, app, flags, environment, before=None):
        self.events = []
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "pybgworker.py"), "run", "--app", app,
             *map(str, flags)],
            cwd=case.folder, stdin=subprocess.DEVNULL, text=True,
            env=clean_environment(PYBGWORKER_DB=str(case.db), **environment),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=before,
        )
        self.pid = self.process.pid
        self.errors = []
        self.unknown = []           # lines that EVENTS does not describe
        self.case = case
        self._readers = [
            threading.Thread(target=self._read, daemon=True),
            threading.Thread(target=self._read_errors, daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def _read(self):
        with contextlib.suppress(ValueError):       # a test has closed it
            for line in self.process.stdout:
                event = json.loads(line)
                self.events.append(event)
                known = pybgworker.EVENTS.get(event["event"])
                every = self.FIELDS if "attempt" in event else self.FIELDS_OF_ALL
                if not known or event.keys() - every - {*known.fields.split()}:
                    self.unknown.append(line)

    def _read_errors(self):
        for line in self.process.stderr:
            self.errors.append(line)

    def wait_for(self, event, timeout=20, **fields):
        """Wait for an event with these fields; return it."""
        return until(lambda: self.find(event, **fields), timeout, f"{event} {fields}")

    def find(self, event, **fields):
        """The first such event so far, or None."""
        return next(iter(self.all(event, **fields)), None)

    def all(self, event, **fields):
        wanted = {"event": event, **fields}
        return [e for e in list(self.events) if wanted.items() <= e.items()]

    def nursery(self):
        """The pid of its nursery (Linux)."""
        pid, = self._started_by(self.pid)
        return pid

    def children(self):
        """Pids of the processes that its nursery has started (Linux)."""
        return [pid for nursery in self._started_by(self.pid)
                for pid in self._started_by(nursery)]

    def _started_by(self, pid):
        path = f"/proc/{pid}/task/{pid}/children"
        return [int(pid) for pid in Path(path).read_text().split()]

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self, timeout=30):
        """Wait for its end; return its exit status."""
        code = self.process.wait(timeout)
        for reader in self._readers:
            reader.join(5)
        return code

    def stop(self, timeout=30):
        """SIGTERM, and wait; return the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(timeout)

    def said(self):
        """Its last words, for the message of a failed assertion."""
        events = map(json.dumps, self.events[-20:])
        return "\n".join(["the worker's last events:", *events, *self.errors])

    def kill(self):
        """SIGKILL, if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            stream.close()
        self.case.assertEqual(self.unknown, [])


class OneChild:
    """A child, and this process as the worker that it serves."""

    def __init__(self, case, source, threads=1, coroutines=0):
        (case.folder / "inside.py").write_text(
            "from pybgworker import *\n" + textwrap.dedent(source))
        self.case, self.undo = case, contextlib.ExitStack()
        self.wire = pybgworker.WorkerEnd(self.undo, coroutines > 0)
        reader, writer = os.pipe()
        self.output, self.crash = pybgworker.OutputPipe(reader), os.pipe()
        frames, messages, beside = self.wire.theirs()
        names = ("durability", "busy_timeout", "max_payload", "allow_network_fs")
        spec = pybgworker.ChildSpec(
            "pybgworker", "inside", [str(HERE), str(case.folder), *sys.path], os.getpid(),
            frames, messages, self.crash[1], reader,
            {"db": str(case.db), **{n: getattr(case.app.settings, n) for n in names}},
            beside=beside, threads=threads, coroutines=coroutines)
        ends = [fd for fd in (frames, messages, beside, self.crash[1], reader) if fd >= 0]
        here, null = os.getcwd(), os.open(os.devnull, os.O_RDONLY)
        os.chdir(case.folder)
        try:
            self.pid = pybgworker.spawn(
                pybgworker.start_argv("run_child", spec), ends, null, writer)
        finally:
            os.chdir(here)
            os.close(null)
        self.wire.given()
        for fd in (writer, self.crash[1]):
            os.close(fd)
        case.addCleanup(self.kill)
        self.exit, self.sent = None, 0
        self.heard = []                     # (kind, id, value)
        until(lambda: self.said(pybgworker.READY), what="ready")

    def run(self, name, *args, timeout=None, beside=False, **kwargs):
        """Send a run; return its id."""
        self.sent += 1
        run = Run(self.sent, name, "q", 0, 3, 0, timeout, 0, None,
                  pybgworker.encode_call(args, kwargs), 5)
        send = self.wire.send_beside if beside else self.wire.send
        until(lambda: self.hear() or send(run), what="room for a frame")
        return run.id

    def beside(self, name, *args, **options):
        return self.run(name, *args, beside=True, **options)

    def hear(self):
        self.wire.read()
        for kind, (run_id, _), value, *_ in self.wire.heard(1 << 20):
            self.heard.append((kind, run_id, value))

    def said(self, kind, run_id=None):
        """The values of such messages so far."""
        self.hear()
        return [v for k, i, v in self.heard if k is kind and run_id in (None, i)]

    def answer(self, run_id, timeout=15):
        """The result of a run, or the error as a dict."""
        def find():
            if not self.alive():
                last = [(k.code, i, v) for k, i, v in self.heard[-20:]]
                self.case.fail(f"{self.exit} {self.output.read()} {last}")
            self.hear()
            return [(k, v) for k, i, v in self.heard if i == run_id and k in (
                pybgworker.SUCCEEDED, pybgworker.ENDED_BADLY, pybgworker.UNKNOWN)]
        (kind, value), = until(find, timeout, f"an answer of {run_id}")
        return pybgworker.decode(value) if kind is pybgworker.SUCCEEDED else value

    def printed(self, run_id):
        return "".join(self.said(pybgworker.PRINTED, run_id))

    def cancel(self, run_id):
        self.wire.cancel(run_id)
        os.kill(self.pid, signal.SIGUSR1)

    def alive(self):
        self.exit = self.exit or pybgworker.poll_exit(self.pid)
        return self.exit is None

    def stop(self, timeout=15):
        """Hang up; return how it ended."""
        self.wire.hang_up()
        until(lambda: not self.alive(), timeout, what="the end of the child")
        return self.exit

    def kill(self):
        if self.alive():
            pybgworker.kill_group(self.pid)
            os.waitpid(self.pid, 0)
        pybgworker.kill_group(self.pid)
        self.undo.close()
        for fd in (self.output.fd, self.crash[0]):
            os.close(fd)


def add_workers(store, *ids):
    """Rows for workers that are driven by hand: only who has one may claim."""
    with store.db.write() as link:
        link.connection.executemany(
            """insert or ignore into bg_worker (id, name, pid, host, boot, port, token,
                concurrency, started_at, beat_at)
                values (?, 'w', 1, 'h', 'b', 0, '', 1, 1, 1)""",
            [(worker,) for worker in ids])


class QueueCase(Case):
    """Tasks and claims by hand, with the test's clock."""

    def setUp(self):
        super().setUp()
        add_workers(self.store, 1, 2)

    def enqueue(self, name="t", queue="default", priority=5, key=None, retries=3,
                at=None, args="[[],{}]", count=1):
        at = self.now if at is None else at
        state = pybgworker.SCHEDULED if at > self.now else pybgworker.QUEUED
        task = NewTask(name, queue, priority, key, retries, None, state, at, self.now)
        return self.store.enqueue(task, [args] * count)[0]

    def order(self, worker=1, queues=None, names=("t", "u"), free=100, ahead=0,
              ahead_names=(), callbacks=None, round=pybgworker.Round(), beside=0,
              beside_names=(), alone=0, most=None, proves_begun=False, **rates):
        return pybgworker.ClaimOrder(
            worker, queues, set(names), free, ahead, set(ahead_names), rates,
            callbacks or {}, beside, frozenset(beside_names), alone, most or {},
            proves_begun, round)

    def claim(self, *args, **kwargs):
        order = self.order(*args, **kwargs)
        self.claimed = self.turn(order=order).claimed
        return self.claimed.runs

    def turn(self, worker=1, **parts):
        return self.store.turn(pybgworker.Turn(worker, **parts), self.now, 5.0)

    def finish(self, run, state=pybgworker.SUCCESS, worker=1, **values):
        """The outcomes that came too late."""
        return self.turn(worker, outcomes=[Outcome(run, state, **values)]).stale

    def status(self, task_id):
        return self.store.task(task_id).status

    def traced(self, act):
        """The SQL statements that `act` runs, as SQLite sees them."""
        connection = self.store.db.link().connection
        found = []
        connection.set_trace_callback(found.append)
        try:
            act()
        finally:
            connection.set_trace_callback(None)
        return found

    def steps(self, act):
        """Virtual machine steps of SQLite, not seconds."""
        count = [0]
        connection = self.store.db.link().connection
        connection.set_progress_handler(lambda: count.__setitem__(0, count[0] + 1), 1)
        act()
        connection.set_progress_handler(None, 1)
        return count[0]


# == Promises =================================================================
# What the README guarantees, each with real processes.

TASKS = """
    import ctypes, os, signal, subprocess, sys, time, asyncio
    from pathlib import Path

    def mark(name, text=""):
        with open(name, "a") as f:
            f.write(f"{text}\\n")

    @task
    def add(a, b):
        return a + b

    @task
    def echo(*args, **kwargs):
        return [args, kwargs]

    @task(retries=0)
    def once(name):
        mark("ran", name)

    @task
    def hold():
        mark("held")
        while not Path("go").exists():
            time.sleep(0.005)

    @task(retries=3)
    def started(n):
        mark("started", f"{n} {current_task().attempt}")
        return n

    @task(retries=0)
    def risky():
        mark("risky", f"{current_task().id} {current_task().attempt}")

    @task(retries=0)
    def leave_a_daemon():
        if os.fork() == 0:
            os.setsid()
            mark("daemon", os.getpid())
            time.sleep(60)
            os._exit(0)

    @task(retries=0)
    def nap(seconds, name="nap"):
        mark(name, os.getpid())
        time.sleep(seconds)
        mark(name + ".end")
        return "slept"

    @task(retries=2)
    def long_nap(seconds):
        mark("nap", os.getpid())
        time.sleep(seconds)
        return current_task().attempt

    @task(retries=0)
    def die(how):
        if how == "segfault":
            ctypes.string_at(0)
        elif how == "exit":
            os._exit(7)
        elif how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "sys.exit":
            sys.exit(3)
        elif how == "interrupt":
            raise KeyboardInterrupt

    @task(retries=1)
    def kill_worker():
        with open(f"/proc/{os.getppid()}/stat") as f:
            os.kill(int(f.read().rpartition(")")[2].split()[1]), signal.SIGKILL)
        time.sleep(30)

    @task(retries=1, retry_delay=0.01)
    def kill_nursery():
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(30)

    @task(retries=2, retry_delay=0.05)
    def flaky():
        if current_task().attempt < 3:
            raise ValueError(f"attempt {current_task().attempt}")
        return current_task().attempt

    @task(retries=5, retry_delay=0, retry_for=(KeyError,))
    def picky():
        raise ValueError("not a KeyError")

    @task(retries=5)
    def abort():
        raise Abort("no use")

    @task(retries=1)
    def again():
        if current_task().attempt == 1:
            raise Retry(countdown=0.05)
        return "second"

    @task(retries=0, timeout=0.2)
    def clean_up():
        try:
            time.sleep(10)
        except pybgworker.TaskTimeout:
            mark("cleaned")
            raise

    import pybgworker

    @task(retries=0, timeout=0.2)
    def stuck_in_c():
        grandchild = subprocess.Popen(["sleep", "60"])
        mark("stuck", f"{os.getpid()} {grandchild.pid}")
        sum(range(10**12))      # holds the interpreter lock and looks at no signal

    @task(retries=0)
    def hold_on():
        grandchild = subprocess.Popen(["sleep", "60"])
        mark("pids", f"{os.getpid()} {grandchild.pid}")
        ctypes.PyDLL(None).sleep(60)

    @task(retries=0)
    def print_all():
        print("from python")
        os.write(1, b"from fd 1\\n")
        subprocess.run(["echo", "from a subprocess"])
        print("to stderr", file=sys.stderr)
        print("no line end", end="")

    @task(retries=0)
    def print_a_lot():
        for _ in range(1000):
            print("x" * 99_999)

    @task(retries=0)
    def write_a_lot():
        for _ in range(1000):
            os.write(1, b"x" * 100_000)

    class Nasty(Exception):
        def __str__(self):
            raise RuntimeError("no text")
        __repr__ = __reduce__ = __str__

    @task(retries=0)
    def nasty():
        raise Nasty

    @task(retries=0)
    def not_json():
        return object()

    @task(retries=0)
    def fork_twice():
        os.fork()
        return os.getpid()

    @task(retries=0)
    def close_fds():
        os.close(1)
        os.close(2)
        print("still here")
        return "closed"

    @task
    def my_pid():
        return os.getpid()

    @task
    def step_of(n):
        mark("steps", n)
        time.sleep(0.004)

    @task(retries=0)
    def urgent():
        mark("steps", "urgent")

    @task(retries=1)
    def urgent_twice():
        mark("steps", "urgent")

    @task(retries=0)
    def call_false():
        subprocess.check_call(["false"])

    @task(retries=0)
    def close_all():
        os.closerange(3, 200)

    @task(retries=0)
    def big(text):
        return text + "!"

    @task
    async def wait_a_moment(n):
        await asyncio.sleep(0.01)
        return n * 2

    @task(retries=0)
    def progressing():
        current_task().set_progress(40, "nearly")
        mark("progress")
        time.sleep(30)

    @task(retries=0, on_success=lambda i: mark("good", i),
          on_failure=lambda i, e: mark("bad", f"{i} {e.kind} {e}"))
    def called_back(how):
        if how == "raise":
            raise ValueError("oh")
        if how == "crash":
            os._exit(9)

    def refuse(task_id):
        raise Abort(f"not for {task_id}")

    @task(retries=0, on_success=refuse)
    def bad_callback():
        pass

    def stay(task_id, error):
        mark("stay", f"{task_id} {len(error.message)} {os.getpid()}")
        if len(open("stay").readlines()) == 1:
            time.sleep(60)

    @task(retries=0, on_failure=stay, timeout=50)
    def long_story():
        raise ValueError("\u20ac" * 15_000)

    @task(on_success=lambda task_id: once.delay(f"after {task_id}"))
    def pass_on(n):
        once.delay(f"in {n}")

    async def later(task_id):
        await asyncio.sleep(0)
        mark("later", f"{task_id} {current_task().name}")
        return object()                 # nobody asks for it

    @task(on_success=later)
    def slowly_called_back():
        pass

    @task(rate_limit=20, retries=0)
    def limited():
        return time.time()

    @task(max_running=2, retries=5, retry_delay=0)
    def few_at_a_time(n):
        began = time.monotonic()
        time.sleep(0.02)
        mark("few", f"{began} {time.monotonic()}")

    @task(max_running=1)
    def one_at_a_time(name):
        mark("began", name)
        while not Path(name).exists():
            time.sleep(0.005)

    @task
    @cron("*/1 * * * *")
    def tick():
        return current_task().scheduled_for
"""


class Served(Case):
    """A folder with TASKS as its app."""

    TASKS = None        # of a class, in place of those

    def setUp(self):
        super().setUp()
        self.tasks = self.module(self.TASKS or TASKS)
        self.addCleanup(os.chdir, os.getcwd())

    def lines(self, name):
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_lines(self, name, count=1):
        until(lambda: len(self.lines(name)) >= count, what=f"{count} lines in {name}")
        return self.lines(name)

    def get(self, result, timeout=20):
        return result.get(timeout=timeout)

    def need_cells(self):
        """Skip the test where nobody can tell what had begun."""
        begun = pybgworker.Begun()
        begun.open(self.store.path, 0, 1)
        if not begun.is_kept:
            self.skipTest("no cells on this file system")
        begun.remove()

    def failure(self, result):
        with self.assertRaises(pybgworker.TaskFailed) as caught:
            result.get(timeout=20)
        return caught.exception


class Promises(Served):

    def test_a_task_runs_and_its_result_is_read(self):
        worker = self.worker()
        result = self.tasks.add.delay(1, 2)

        self.assertEqual(self.get(result), 3)
        worker.wait_for("task_success", task_id=result.id, name="tasks.add", attempt=1)
        self.assertEqual(worker.stop(), 0)

    def test_the_start_says_what_is_served(self):
        start = self.worker("--concurrency", 3, "--threads", 5, "--queues",
                            "a,b").wait_for("worker_start")

        self.assertEqual(start["db"], str(self.db))
        self.assertEqual(start["queues"], ["a", "b"])
        self.assertEqual((start["concurrency"], start["schedules"]), (3, 1))
        self.assertEqual((start["threads"], start["coroutines"]), (5, 100))
        self.assertIn("tasks.add", start["tasks"])

    def test_no_more_than_max_running_run_at_a_time_whatever_is_killed(self):
        workers = [self.worker("--concurrency", 3) for _ in range(2)]
        results = self.tasks.few_at_a_time.delay_many([(n,) for n in range(60)])
        other = self.tasks.add.delay(1, 2)
        self.assertEqual(self.get(other), 3)
        self.assertLess(len(self.lines("few")), 50, "it delays nobody")
        until(lambda: len(self.lines("few")) > 15)
        workers[0].kill()
        for result in results:
            self.get(result)
        runs = [list(map(float, line.split())) for line in self.lines("few")]
        moves = [(began, 1) for began, _ in runs] + [(ended, -1) for _, ended in runs]
        running = list(itertools.accumulate(move for _, move in sorted(moves)))
        self.assertEqual(max(running), 2)

    def test_a_producer_killed_after_delay_loses_nothing(self):
        code = """
            import os, sys
            sys.path.insert(0, ".")
            import tasks
            for n in range(100):
                print(tasks.add.delay(n, n).id, flush=True)
            os.kill(os.getpid(), 9)
        """
        done = self.python(code, check=False)

        ids = [int(line) for line in done.stdout.split()]
        self.assertEqual(ids, [row[0] for row in self.sql("select id from bg_task")])

    def test_two_workers_run_each_task_once(self):
        results = self.tasks.started.delay_many([(n,) for n in range(400)])
        for _ in range(2):
            self.worker("--concurrency", 2)

        self.assertEqual([self.get(r) for r in results], list(range(400)))
        self.assertEqual(len(self.lines("started")), 400)
        self.assertEqual(len(set(self.lines("started"))), 400)

    def test_the_tasks_of_a_killed_worker_start_again_within_two_seconds(self):
        result = self.tasks.long_nap.delay(60)
        first, second = self.worker("--concurrency", 1), None
        self.wait_lines("nap")
        second = self.worker("--concurrency", 1)
        second.wait_for("worker_ready")

        killed_at = time.monotonic()
        first.kill()

        self.wait_lines("nap", 2)
        self.assertLess(time.monotonic() - killed_at, 2)
        second.wait_for("task_lost", task_id=result.id)

    def test_a_crash_costs_one_task_and_says_why(self):
        self.worker("--concurrency", 2)
        others = self.tasks.add.delay_many([(n, 1) for n in range(50)])
        rows = {"segfault": ("SIGSEGV", None), "exit": ("", 7), "kill": ("SIGKILL", None)}
        for how, (name, code) in rows.items():
            failed = self.failure(self.tasks.die.delay(how))
            stored = self.store.error(failed.task_id)
            with self.subTest(how):
                self.assertEqual((failed.kind, failed.error_type), ("crash", name))
                self.assertEqual(stored.get("exit_code"), code)
                self.assertEqual(str(failed).count(name or "code 7"), 1)
            if how == "segfault":
                self.assertIn("in die", failed.traceback)
        self.assertEqual([self.get(r) for r in others], list(range(1, 51)))

    def test_sys_exit_and_keyboard_interrupt_fail_the_task_only(self):
        self.worker("--concurrency", 1)
        for how, name in (("sys.exit", "SystemExit"), ("interrupt", "KeyboardInterrupt")):
            with self.subTest(how):
                failed = self.failure(self.tasks.die.delay(how))
                self.assertEqual((failed.kind, failed.error_type), ("exception", name))

    def test_history_misses_at_most_the_last_tenth_of_a_second_of_a_killed_worker(self):
        self.store.create()
        self.fill(6000, name="'tasks.echo'")
        worker = self.worker("--concurrency", 2, "--rate-limit", "1500")
        until(lambda: self.sql("select max(finished_at) - min(finished_at) > 2000 "
                               "from bg_task")[0][0], 60, "two seconds of work")
        worker.kill()
        ended = [at for at, in self.sql("select finished_at from bg_task "
                                        "where state = 4 order by 1")]
        counted, = self.sql("select sum(runs) from bg_history")[0]
        missing = len(ended) - counted
        self.assertGreaterEqual(missing, 0)
        # The rest of this second is for a machine that stops it at a bad moment.
        self.assertLess(ended[-1] - ended[-1 - missing], 1000)

        self.worker("--concurrency", 2, "--burst").wait()
        self.assertEqual(self.sql("select state, count(*) from bg_task group by 1"),
                         [(4, 6000)])
        total = pybgworker.merged(self.store.totals())
        self.assertEqual(total.succeeded, 6000 - missing)
        self.assertEqual(total.runs, total.succeeded + total.lost)

    ENDS = """
        call               | runs succeeded failed retried exceptions crashed timeouts aborted
        add(1, 2)          | 1 1 0 0 0 0 0 0
        flaky()            | 3 1 0 2 2 0 0 0
        again()            | 2 1 0 1 1 0 0 0
        picky()            | 1 0 1 0 1 0 0 0
        abort()            | 1 0 1 0 0 0 0 1
        die("kill")        | 1 0 1 0 0 1 0 0
        clean_up()         | 1 0 1 0 0 0 1 0
        stuck_in_c()       | 1 0 1 0 0 0 1 0
    """

    def test_every_run_that_ends_is_counted_by_how_it_ended(self):
        head, *lines = self.ENDS.strip().splitlines()
        words = head.split("|")[1].split()
        wanted = {}
        for line in lines:
            call, _, numbers = line.partition("|")
            name, _, args = call.strip()[:-1].partition("(")
            getattr(self.tasks, name).delay(*eval(f"[{args}]"))
            wanted[f"tasks.{name}"] = list(map(int, numbers.split()))
        worker = self.worker("--concurrency", 2)
        until(lambda: self.sql("select min(state) > 3 from bg_task") == [(1,)], 60)
        self.assertEqual(worker.stop(), 0)
        rows = self.store.totals()
        self.assertEqual({row.name: [getattr(row, word) for word in words]
                          for row in rows}, wanted)
        for row in rows:
            with self.subTest(row.name):
                self.assertEqual(sum(row.ran), row.runs)
                self.assertEqual(sum(row.waited), row.runs)

    def test_a_task_that_kills_its_worker_fails_in_the_end(self):
        if not Path("/proc/self/stat").exists():
            self.skipTest("needs /proc")
        result = self.tasks.kill_worker.delay()
        for _ in range(2):
            self.assertEqual(self.worker("--concurrency", 1).wait(), -signal.SIGKILL)
        self.worker("--concurrency", 1)

        self.assertEqual(self.failure(result).kind, "lost")
        self.assertEqual(result.attempt, 2)

    def test_a_failing_task_is_retried_until_it_works(self):
        worker = self.worker()
        result = self.tasks.flaky.delay()

        self.assertEqual(self.get(result), 3)
        retries = worker.all("task_retry", task_id=result.id)
        self.assertEqual([event["attempt"] for event in retries], [1, 2])

    def test_abort_retry_and_retry_for(self):
        self.worker()
        self.assertEqual(self.get(self.tasks.again.delay()), "second")
        for task, kind in ((self.tasks.abort, "abort"), (self.tasks.picky, "exception")):
            result = task.delay()
            with self.subTest(task.name):
                self.assertEqual(self.failure(result).kind, kind)
                self.assertEqual(result.attempt, 1)

    def test_at_its_time_limit_a_task_may_clean_up(self):
        self.worker()
        failed = self.failure(self.tasks.clean_up.delay())

        self.assertEqual((failed.kind, failed.error_type), ("timeout", "TaskTimeout"))
        self.assertEqual(len(self.lines("cleaned")), 1)

    def test_a_killed_worker_costs_no_task_a_run_that_had_not_begun(self):
        """Though up to 128 wait in the pipe of a child, and what it forked lives on."""
        self.need_cells()
        first = self.worker("--concurrency", 1)
        other = self.worker("--concurrency", 1, "--queues", "other")
        self.get(self.tasks.leave_a_daemon.delay())
        self.addCleanup(os.kill, int(self.wait_lines("daemon")[0]), signal.SIGKILL)
        other.wait_for("worker_ready")
        self.tasks.risky.delay_many([()] * 3000)
        self.wait_lines("risky")
        first.kill()

        until(lambda: not self.sql("select 1 from bg_task where state = 3"), 2.5)
        rows = self.sql("select id, state, attempt from bg_task where name like '%.risky'")
        begun = {int(line.split()[0]) for line in self.lines("risky")}
        failed = {number for number, state, _ in rows if state == 5}
        self.assertLessEqual(len(failed - begun), 1)    # it was about to write its line
        self.assertEqual({attempt for _, state, attempt in rows if state == 2}, {0})
        until(lambda: len(other.all("task_lost")) == len(failed), 5)
        self.worker("--concurrency", 2, "--burst").wait()
        starts = self.lines("risky")
        self.assertEqual(len(starts), len(set(starts)))
        self.assertLessEqual(3000 - len(starts), 1)

    def test_c_code_that_never_returns_is_killed_with_its_group(self):
        self.worker("--concurrency", 1)
        failed = self.failure(self.tasks.stuck_in_c.delay())

        self.assertEqual(failed.kind, "timeout")
        self.assertIn("in stuck_in_c", failed.traceback)
        for pid in map(int, self.lines("stuck")[0].split()):
            until(lambda pid=pid: not is_alive(pid), 1)

    def test_a_running_task_is_cancelled_within_a_second(self):
        self.worker()
        result = self.tasks.nap.delay(30)
        self.wait_lines("nap")
        asked_at = time.monotonic()
        result.cancel()

        self.assertRaises(pybgworker.TaskCancelled, self.get, result)
        self.assertLess(time.monotonic() - asked_at, 1)
        self.assertEqual(self.lines("nap.end"), [])

    def test_the_first_signal_lets_running_tasks_finish(self):
        worker = self.worker("--concurrency", 1)
        running = self.tasks.nap.delay(0.5)
        waiting = self.tasks.nap.delay(0.5, "other")
        self.wait_lines("nap")

        self.assertEqual(worker.stop(), 0)
        self.assertEqual((running.status, waiting.status), ("success", "queued"))
        self.assertEqual(waiting.attempt, 0)

    def test_the_first_signal_says_what_is_waited_for_while_it_is(self):
        worker = self.worker("--concurrency", 1, "--shutdown-timeout", 20)
        result = self.tasks.nap.delay(30)
        self.wait_lines("nap")
        worker.signal(signal.SIGINT)
        said = worker.wait_for("worker_stopping")
        self.assertEqual((said["running"], said["patience"]), (1, 20.0))
        self.assertEqual(said["tasks"], [f"{result.id} tasks.nap"])
        self.assertIsNone(worker.find("worker_stop"))
        worker.signal(signal.SIGINT)
        self.assertEqual(worker.wait(), 0)

    def test_a_closed_terminal_is_a_graceful_stop_however_often_it_says_so(self):
        result = self.tasks.nap.delay(0.5)
        worker = self.worker("--concurrency", 1)
        self.wait_lines("nap")
        worker.signal(signal.SIGHUP)
        worker.signal(signal.SIGHUP)
        self.assertEqual(worker.wait(), 0)
        self.assertEqual(result.result, "slept")
        self.assertTrue(worker.find("worker_stop"))

    def test_under_nohup_a_hangup_is_ignored(self):
        worker = self.worker(
            "--concurrency", 1, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        worker.wait_for("worker_ready")
        worker.signal(signal.SIGHUP)
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
        self.assertEqual(worker.stop(), 0)

    def test_a_worker_is_stopped_while_it_imports_the_app(self):
        (self.folder / "slow.py").write_text(
            "import time\nopen('importing', 'w').write('1\\n')\ntime.sleep(60)\n")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            worker = self.worker(app="slow")
            self.wait_lines("importing")
            worker.signal(number)
            self.assertEqual(worker.wait(), 0)
            self.assertEqual(worker.errors, ["pybgworker: stopped before it began\n"])
            os.remove("importing" if os.getcwd() == str(self.folder)
                      else self.folder / "importing")

    def test_it_does_not_matter_what_signals_the_starter_blocked_or_ignored(self):
        def before():
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

        worker = self.worker("--concurrency", 2, before=before)
        crash = self.tasks.die.delay("exit")
        self.assertEqual(self.failure(crash).kind, "crash")
        self.assertEqual(worker.wait_for("task_crash")["exit_code"], 7)
        self.assertEqual(self.failure(self.tasks.clean_up.delay()).kind, "timeout")
        self.assertEqual(self.lines("cleaned"), [""])
        self.assertIn("CalledProcessError", str(self.failure(self.tasks.call_false.delay())))
        napping = self.tasks.nap.delay(30)
        self.wait_lines("nap")
        napping.cancel()
        self.assertRaises(pybgworker.TaskCancelled, self.get, napping)
        self.assertEqual(worker.stop(), 0)

    PATCHED = """
        import os, selectors, signal, socket, subprocess, time
        from pybgworker import *

        class Waiting(socket.socket):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                os.set_blocking(self.fileno(), False)
            def recv(self, size, flags=0):
                while True:
                    try:
                        return super().recv(size)
                    except BlockingIOError:
                        pass

        def refuse(*_, **__):
            raise AssertionError("patched")

        def set_signal(number, handler, real=signal.signal):
            return refuse() if number == signal.SIGCHLD else real(number, handler)

        subprocess.Popen, subprocess._fork_exec = refuse, None
        selectors.DefaultSelector = socket.socketpair = refuse
        socket.socket, signal.signal = Waiting, set_signal
        os.waitpid = time.sleep = refuse
    """
    SUMS = """
        import os, time
        @task
        def sum_of(a, b):
            return a + b
        @task(retries=0)
        def leave():
            os._exit(7)
    """

    def serve_patched(self, name, source):
        (self.folder / f"{name}.py").write_text(
            textwrap.dedent(source) + textwrap.dedent(self.SUMS))
        worker = self.worker("--concurrency", 1, app=name)
        results = [self.app.send(f"{name}.sum_of", n, 1) for n in range(5)]
        self.assertEqual([self.get(r) for r in results], [1, 2, 3, 4, 5])
        self.assertEqual(self.failure(self.app.send(f"{name}.leave")).kind, "crash")
        self.assertEqual(worker.wait_for("task_crash")["exit_code"], 7)
        self.assertEqual(self.get(self.app.send(f"{name}.sum_of", 2, 2)), 4)
        began = time.monotonic()
        self.assertEqual(worker.stop(), 0)
        # Nothing of it had to be killed.
        self.assertLess(time.monotonic() - began, pybgworker.EXIT_GRACE)

    def test_an_app_may_replace_the_standard_library(self):
        """As gevent does, but worse."""
        self.serve_patched("patched", self.PATCHED)

    def serve_green(self, module, patch):
        if importlib.util.find_spec(module) is None:
            self.skipTest(f"{module} is not installed")
        self.serve_patched("green", f"{patch}\nfrom pybgworker import *\n")

    def test_an_app_may_use_gevent(self):
        self.serve_green("gevent", "from gevent import monkey; monkey.patch_all()")

    def test_an_app_may_use_eventlet(self):
        self.serve_green("eventlet", "import eventlet; eventlet.monkey_patch()")

    def test_the_second_signal_hands_the_run_back_without_a_charge(self):
        worker = self.worker("--concurrency", 1)
        result = self.tasks.nap.delay(30)
        self.wait_lines("nap")
        worker.signal(signal.SIGTERM)
        worker.signal(signal.SIGINT)

        self.assertEqual(worker.wait(), 0)
        self.assertEqual(worker.find("worker_stop")["handed_back"], 1)
        row = self.store.task(result.id)
        self.assertEqual((row.status, row.attempt, row.forgiven), ("queued", 1, 1))

    def test_a_stop_ends_what_runs_longer_than_the_shutdown_timeout(self):
        worker = self.worker("--concurrency", 1, "--shutdown-timeout", "0.3")
        result = self.tasks.nap.delay(30)
        self.wait_lines("nap")

        self.assertEqual(worker.stop(), 0)
        self.assertEqual(result.status, "queued")

    def test_a_key_has_one_unfinished_task(self):
        call = self.tasks.add.options(key="k")
        first, second = call.delay(1, 2), call.delay(3, 4)
        self.assertEqual(first, second)
        self.worker()

        self.assertEqual(self.get(first), 3)
        self.assertNotEqual(call.delay(5, 6), first)

    def test_a_task_belongs_to_the_callers_transaction(self):
        self.store.data_version()
        mine = sqlite3.connect(self.db, isolation_level=None)
        mine.execute("create table orders (id)")
        for word in ("rollback", "commit"):
            mine.execute("begin")
            mine.execute("insert into orders values (1)")
            result = self.tasks.add.options(conn=mine).delay(1, 2)
            mine.execute(word)
        mine.close()
        self.worker()

        self.assertEqual(self.get(result), 3)
        self.assertEqual(self.sql("select count(*) from bg_task "
                                  "where name = 'tasks.add'"), [(1,)])

    def test_a_cron_tick_is_run_once_by_two_workers(self):
        self.worker("--burst").wait()
        self.sql("update bg_schedule set done = '[[1700000040, 1700000040]]'")
        self.sql("delete from bg_task")         # a minute may have begun meanwhile
        workers = [self.worker("--concurrency", 1) for _ in range(2)]
        fired = until(lambda: [e for w in workers for e in w.all("cron_fired")])
        for worker in workers:
            worker.wait_for("worker_ready")

        result = self.app.result(fired[0]["task_id"])
        tick = self.get(result)
        self.assertEqual(tick.second, 0)
        self.assertEqual(self.sql("select count(*) from bg_task where tick = ?",
                                  int(tick.timestamp())), [(1,)])

    def test_a_rate_holds_over_all_workers_and_delays_nothing_else(self):
        results = [self.tasks.limited.delay() for _ in range(60)]
        for _ in range(2):
            self.worker("--concurrency", 2)
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
        self.assertFalse(results[-1].ready())

        starts = sorted(self.get(r) for r in results)
        self.assertLess(starts[19] - starts[0], 0.95)       # the burst: not one by one
        for number, at in enumerate(starts):                # then 20 a second
            earliest = (number - 19) / 20
            self.assertGreater(at - starts[0], earliest - 0.25, number)

    def test_a_paused_queue_is_left_alone(self):
        self.store.pause("slow", self.now)
        held = self.tasks.add.options(queue="slow").delay(1, 1)
        self.worker()
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
        self.assertEqual(held.status, "queued")

        self.store.resume("slow")
        self.assertEqual(self.get(held), 2)

    def test_tasks_of_one_queue_run_by_priority_then_in_order(self):
        for name, priority in (("c", 9), ("a", 1), ("d", 9), ("b", 5)):
            last = self.tasks.once.options(priority=priority).delay(name)
        self.worker("--concurrency", 1, "--burst").wait()

        self.assertTrue(last.ready())
        self.assertEqual(self.lines("ran"), ["a", "b", "c", "d"])

    def test_twenty_megabytes_go_in_and_come_out(self):
        self.worker("--concurrency", 1)
        text = "x" * 20_000_000
        self.assertEqual(self.get(self.tasks.big.delay(text), 60), text + "!")

    def test_callbacks_run_after_the_last_attempt(self):
        worker = self.worker()
        good = self.tasks.called_back.delay("")
        bad = self.tasks.called_back.delay("raise")
        crashed = self.tasks.called_back.delay("crash")

        self.assertEqual(self.wait_lines("good"), [str(good.id)])
        lines = sorted(self.wait_lines("bad", 2))
        self.assertEqual(lines[0], f"{bad.id} exception ValueError: oh")
        self.assertTrue(lines[1].startswith(f"{crashed.id} crash crash: the process"))
        slow = self.tasks.slowly_called_back.delay()
        text = f"{slow.id} tasks.slowly_called_back:on_success"
        self.assertEqual(self.wait_lines("later"), [text])
        worker.wait_for("task_success", name="tasks.slowly_called_back:on_success")

    def test_a_callback_that_fails_is_a_failed_task(self):
        worker = self.worker()
        result = self.tasks.bad_callback.delay()
        event = worker.wait_for("callback_error", callback="on_success")
        self.assertEqual(event["error"], f"Abort: not for {result.id}")
        self.assertEqual(result.status, "success")
        failed, = self.store.tasks(name="tasks.bad_callback:on_success")
        self.assertEqual((failed.status, failed.id), ("failed", event["task_id"]))

    def test_a_callback_is_run_again_when_its_worker_is_killed_and_gets_all_of_the_error(
            self):
        first = self.worker("--concurrency", 1)
        result = self.tasks.long_story.delay()
        self.wait_lines("stay")
        first.kill()
        self.worker("--concurrency", 1)

        lines = self.wait_lines("stay", 2)
        self.assertEqual({line.split()[0] for line in lines}, {str(result.id)})
        self.assertEqual({line.split()[1] for line in lines}, {"15000"})
        self.assertEqual(result.attempt, 1)

    def test_progress_is_seen_while_the_task_runs(self):
        self.worker()
        result = self.tasks.progressing.delay()
        self.wait_lines("progress")
        until(lambda: result.progress)

        self.assertEqual(result.progress, (40, "nearly"))
        result.cancel()

    def test_any_keyword_text_and_number_reach_the_function(self):
        words = ("self", "task", "fn", "args", "kwargs", "name", "timeout", "text", "a b",
                 "\ud83d\ude00", "\udc00")
        kwargs = {word: word for word in words}
        self.worker()
        result = self.tasks.echo.delay("\ud83d\ude00", 10**639, -10**641, **kwargs)
        self.assertEqual(self.get(result), [("\ud83d\ude00", 10**639, -10**641), kwargs])

    def test_async_functions_are_tasks(self):
        self.worker()
        self.assertEqual(self.get(self.tasks.wait_a_moment.delay(21)), 42)

    def test_what_a_task_prints_is_captured_with_its_id(self):
        worker = self.worker("--concurrency", 1)
        result = self.tasks.print_all.delay()
        self.get(result)

        for text in ("from python", "to stderr", "no line end"):
            worker.wait_for("output", task_id=result.id, text=text)
        stored = self.store.output(result.id)
        for text in ("from python", "from fd 1", "from a subprocess"):
            self.assertIn(text, stored)

    def test_a_hundred_megabytes_of_output_are_bounded(self):
        self.worker("--concurrency", 1)
        for task in (self.tasks.print_a_lot, self.tasks.write_a_lot):
            result = task.delay()
            self.get(result, 60)
            with self.subTest(task.name):
                text = self.store.output(result.id)
                self.assertLess(len(text), 70_000)
                self.assertRegex(text, r"\n… \d+\.\d MB cut …\n")

    def test_an_exception_that_cannot_be_printed_is_reported(self):
        self.worker()
        failed = self.failure(self.tasks.nasty.delay())
        self.assertEqual(failed.error_type, "Nasty")
        self.assertIn("cannot be printed", str(failed))

    def test_a_result_that_json_cannot_hold_fails_with_its_path(self):
        self.worker()
        failed = self.failure(self.tasks.not_json.delay())
        self.assertEqual(failed.error_type, "PayloadTypeError")
        self.assertIn("result: <class object>", str(failed))

    def test_a_task_that_forks_answers_once(self):
        self.worker("--concurrency", 1)
        self.assertIsInstance(self.get(self.tasks.fork_twice.delay()), int)
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)

    def cpu_seconds(self, pid):
        """Used so far by that process; 0 where /proc does not tell."""
        with contextlib.suppress(FileNotFoundError):
            ticks = Path(f"/proc/{pid}/stat").read_text().split()[13:15]
            return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        return 0

    def test_a_task_may_close_its_descriptors(self):
        worker = self.worker("--concurrency", 1)
        self.assertEqual(self.get(self.tasks.close_fds.delay()), "closed")
        before = self.cpu_seconds(worker.pid)
        self.get(self.tasks.nap.delay(1))
        self.assertLess(self.cpu_seconds(worker.pid) - before, 0.3)
        self.assertEqual(self.failure(self.tasks.close_all.delay()).kind, "crash")
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)

    def test_a_locked_database_delays_and_loses_nothing(self):
        worker = self.worker()
        worker.wait_for("worker_ready")
        result = self.tasks.nap.delay(0.2)
        self.wait_lines("nap")
        other = sqlite3.connect(self.db, isolation_level=None)
        other.execute("begin immediate")
        self.wait_lines("nap.end")
        late = threading.Thread(target=lambda: self.tasks.add.delay(1, 2))
        late.start()
        time.sleep(0.7)
        self.assertEqual(result.status, "running")
        other.execute("rollback")
        other.close()

        self.assertEqual(self.get(result), "slept")
        late.join()
        self.assertEqual(self.get(self.app.result(result.id + 1)), 3)

    def test_a_worker_whose_file_is_replaced_ends(self):
        worker = self.worker()
        worker.wait_for("worker_ready")
        App(db=str(self.folder / "new.db")).store.create()
        os.rename(self.folder / "new.db", self.db)

        self.assertEqual(worker.wait(), 1)
        self.assertIn("the file was replaced", "".join(worker.errors))

    def on_a_disk(self):
        """Have the database in a folder that can be taken away."""
        disk = self.folder / "disk"
        disk.mkdir()
        self.db = disk / "queue.db"
        self.app.store.close()
        self.app = pybgworker.default_app
        pybgworker.configure(db=str(self.db))
        return disk, self.folder / "away"

    def test_a_database_that_is_away_for_a_while_costs_no_run(self):
        disk, away = self.on_a_disk()
        worker = self.worker("--concurrency", 1, "--heartbeat-interval", "0.1")
        result = self.tasks.once.delay("first")
        nap = self.tasks.nap.options(retries=0).delay(0.3)
        self.wait_lines("nap")
        os.rename(disk, away)
        disk.mkdir()                            # the empty mount point
        worker.wait_for("database_error")
        worker.wait_for("heartbeat_error")
        self.wait_lines("nap.end")
        with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "gone"):
            self.tasks.add.delay(1, 2)
        self.assertEqual(os.listdir(disk), [])
        disk.rmdir()
        os.rename(away, disk)

        self.assertEqual(self.get(nap), "slept")
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
        self.assertEqual(result.status, "success")
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])
        self.assertEqual(worker.stop(), 0)

    def test_a_stop_claims_no_hand_back_that_it_could_not_write(self):
        disk, away = self.on_a_disk()
        worker = self.worker("--concurrency", 1)
        nap = self.tasks.nap.delay(30)
        self.wait_lines("nap")
        os.rename(disk, away)
        worker.signal(signal.SIGTERM)
        worker.signal(signal.SIGINT)

        self.assertEqual(worker.wait(), 0)
        self.assertEqual(worker.find("worker_stop")["handed_back"], 0)
        os.rename(away, disk)
        self.assertEqual(nap.status, "running")

    def test_a_worker_that_was_given_up_kills_its_runs(self):
        flags = ("--concurrency", 1, "--heartbeat-interval", "0.2", "--worker-timeout", 1)
        first = self.worker(*flags)
        result = self.tasks.long_nap.delay(60)
        pid = int(self.wait_lines("nap")[0])
        second = self.worker(*flags)
        second.wait_for("worker_ready")
        first.signal(signal.SIGSTOP)
        second.wait_for("task_lost", task_id=result.id)
        self.wait_lines("nap", 2)
        first.signal(signal.SIGCONT)

        first.wait_for("task_lost", reason="this worker was given up")
        until(lambda: not is_alive(pid), 2)
        self.assertEqual((result.status, result.attempt), ("running", 2))

    def test_no_process_outlives_a_killed_worker(self):
        worker = self.worker("--concurrency", 2)
        self.tasks.hold_on.delay()
        pids = [int(pid) for pid in self.wait_lines("pids")[0].split()]
        if Path("/proc/self/task").exists():
            pids += [worker.nursery(), *worker.children()]
        worker.kill()

        until(lambda: not any(map(is_alive, pids)), 1, "the end of all processes")

    def test_a_thousand_tasks_leave_no_descriptor_open(self):
        worker = self.worker("--concurrency", 2)
        self.get(self.tasks.add.delay(1, 2))
        if not Path("/proc/self/fd").exists():
            self.skipTest("needs /proc")
        until(lambda: len(worker.children()) == 3)
        folders = [Path(f"/proc/{pid}/fd") for pid in (worker.pid, worker.nursery())]
        before = [len(list(fds.iterdir())) for fds in folders]
        for result in [self.tasks.die.delay("exit") for _ in range(5)] + \
                self.tasks.add.delay_many([(1, n) for n in range(1000)]):
            until(result.ready)
        until(lambda: len(worker.children()) == 3)

        def are_there():        # while a child is born there are some more, then as now
            found = [len(list(fds.iterdir())) for fds in folders]
            return all(map(int.__le__, found, before))

        until(are_there, what="the end of all other descriptors")

    def test_a_worker_outlives_the_reader_of_its_log(self):
        worker = self.worker()
        worker.wait_for("worker_ready")
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, worker.process.stdout.fileno())
        os.close(null)

        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
        self.assertEqual(self.get(self.tasks.add.delay(3, 4)), 7)

    def test_burst_ends_when_nothing_is_due(self):
        done = self.tasks.add.delay(1, 2)
        later = self.tasks.add.options(countdown=60).delay(1, 2)

        self.assertEqual(self.worker("--burst").wait(), 0)
        self.assertEqual((done.status, later.status), ("success", "scheduled"))

    def test_a_slow_task_does_not_hold_up_quick_ones_of_its_name(self):
        nap = self.tasks.nap.options(retries=1)
        self.worker("--concurrency", 2).wait_for("worker_ready")
        worst = []
        for _ in range(3):                  # the machine may be busy with others
            calls = [(0.0001, "q")] * 100 + [(1, "slow")] + [(0.0001, "q")] * 1000
            results = nap.delay_many(calls)
            for result in results:
                until(result.ready)
            rows = self.sql("select started_at, finished_at from bg_task "
                            "where id >= ? order by started_at", results[0].id)
            slow = max(rows, key=lambda row: row[1] - row[0])
            during = [at for at, _ in rows if slow[0] <= at <= slow[1]]
            self.assertGreater(len(during), 300)
            worst.append(max(b - a for a, b in zip(during, during[1:])))
            if worst[-1] < 100:
                return
        self.fail(f"milliseconds without a start: {worst}")


# == Settings =================================================================


class Settings(unittest.TestCase):

    GOOD = """
        concurrency          8          8
        queues               a,b        ('a','b')
        rate_limit           5/s        5.0
        rate_limit           90/m       1.5
        timeout              1.5        1.5
        timeout              2m         120.0
        shutdown_timeout     0          0.0
        retention            7d         604800.0
        retention            forever    1e999
        retention            0s         0.0
        timeout              0.30000000000000004 0.30000000000000004
        max_memory           2g         2147483648
        max_memory           2048k      2097152
        max_payload          512k       524288
        concurrency          1000       1000
        durability           normal     'normal'
        allow_network_fs     yes        True
        http                 8080       '127.0.0.1:8080'
        http                 a-b.c:0    'a-b.c:0'
        http                 [::1]:80   '[::1]:80'
        web_token            abcd-1234  'abcd-1234'
        redact               (?i)pin$   '(?i)pin$'
    """
    BAD = """
        concurrency          0          whole number
        concurrency          -1         whole number
        concurrency          many       whole number
        concurrency          1001       whole number from 1 to 1,000
        max_memory           512        at least 1m
        queues               ,          queue names
        rate_limit           0          starts per second
        rate_limit           5/week     starts per second
        timeout              -1         seconds above 0
        timeout              nan        seconds above 0
        timeout              99999w     at most 31 years
        worker_name          a\ud800b   no NUL or lone surrogate
        max_payload          2g         at most 900m
        rate_limit           5/         starts per second
        retention            soon       seconds above 0
        max_memory           lots       bytes above 0
        durability           maybe      full or normal
        allow_network_fs     perhaps    1 or 0
        http                 65536      PORT or HOST:PORT
        http                 ::1:80     PORT or HOST:PORT
        http                 a:b        PORT or HOST:PORT
        http                 http://a:8 PORT or HOST:PORT
        web_token            short      8 to 200 ASCII characters
        redact               (          a regular expression: missing )
    """

    def test_an_empty_variable_is_none_but_where_that_says_something(self):
        """PYBGWORKER_REDACT= hides nothing."""
        resolve = pybgworker.resolve_settings
        self.assertEqual(resolve({}, {"PYBGWORKER_REDACT": ""}, {}).redact, "")
        self.assertRegex("Password", resolve({}, {}, {}).redact)
        for setting in pybgworker.SETTINGS:
            if not setting.may_be_empty:
                found = resolve({}, {"PYBGWORKER_" + setting.name.upper(): ""}, {})
                default = resolve({}, {}, {})
                self.assertEqual(getattr(found, setting.name),
                                 getattr(default, setting.name))

    def test_a_parsed_value_may_be_parsed_again(self):
        values = [(name, text) for name, text, _ in self.rows(self.GOOD)]
        for name, value in [*values, ("rate_limit", 1 / 3), ("timeout", 0.1 + 0.2),
                            ("rate_limit", "100/m"), ("heartbeat_interval", 1e-05)]:
            with self.subTest(name, value=value):
                parsed = pybgworker.check_setting(name, value, name)
                self.assertEqual(pybgworker.check_setting(name, parsed, name), parsed)

    def test_a_list_of_queues_has_names_that_a_queue_can_have(self):
        self.assertEqual(App(queues=["a", "b"]).settings.queues, ("a", "b"))
        for queues in (["a,b"], [" a"], [1]):
            self.assertRaises(pybgworker.SettingError, App, queues=queues)
        for queues in ([], iter([]), 7):
            with self.assertRaisesRegex(pybgworker.SettingError, "or a list of them"):
                App(queues=queues)

    def rows(self, table):
        return [line.split(None, 2) for line in table.strip().splitlines()]

    def test_values_of_the_environment_are_parsed(self):
        for name, text, value in self.rows(self.GOOD):
            with self.subTest(f"{name}={text}"):
                variable = "PYBGWORKER_" + name.upper()
                found = pybgworker.resolve_settings({}, {variable: text}, {})
                self.assertEqual(getattr(found, name), ast.literal_eval(value))

    def test_a_bad_value_is_refused_with_variable_value_and_what_is_allowed(self):
        for name, text, allowed in self.rows(self.BAD):
            variable = "PYBGWORKER_" + name.upper()
            with self.subTest(variable), self.assertRaises(pybgworker.SettingError) as e:
                pybgworker.resolve_settings({}, {variable: text}, {})
            self.assertTrue(str(e.exception).startswith(f"{variable}={text!r}: must be"))
            self.assertIn(allowed, str(e.exception))

    def test_flag_beats_environment_beats_code_beats_default(self):
        environ = {"PYBGWORKER_TIMEOUT": "2"}
        resolve = pybgworker.resolve_settings
        self.assertEqual(resolve({"timeout": 1}, environ, {"timeout": 3}).timeout, 3)
        self.assertEqual(resolve({"timeout": 1}, environ, {}).timeout, 2)
        self.assertEqual(resolve({"timeout": 1}, {}, {}).timeout, 1)
        self.assertIsNone(resolve({}, {}, {}).timeout)

    def test_defaults_are_those_of_the_table(self):
        found = pybgworker.resolve_settings({}, {}, {})
        self.assertEqual(found.concurrency, os.cpu_count())
        self.assertTrue(found.worker_name.endswith(f"-{os.getpid()}"))
        self.assertEqual((found.db, found.durability), ("pybgworker.db", "full"))

    def test_a_worker_must_be_able_to_beat_in_time(self):
        with self.assertRaisesRegex(pybgworker.SettingError, "must be above heartbeat"):
            pybgworker.resolve_settings({"heartbeat_interval": 20.0}, {}, {})

    def test_configure_refuses_unknown_names_and_bad_values(self):
        self.assertRaisesRegex(pybgworker.SettingError, "unknown setting 'colour'",
                               App, colour="red")
        self.assertRaisesRegex(pybgworker.SettingError, "concurrency=0", App,
                               concurrency=0)

    def test_configure_sets_all_or_nothing(self):
        app = App(concurrency=2)
        for bad in ({"timeout": "never"}, {"colour": "red"}):
            with self.assertRaises(pybgworker.SettingError):
                app.configure(concurrency=7, **bad)
            app.configure()             # the next reads all settings anew
            self.assertEqual(app.settings.concurrency, 2)

    def test_a_path_is_one_of_a_file(self):
        for path in ("", "a\0b", ":memory:", "file:a.db", 7, b"a.db"):
            with self.assertRaisesRegex(pybgworker.SettingError, "the path of a file"):
                App(db=path)


# == States and errors ========================================================


class Refused(pybgworker.Abort):
    """What a program may derive from ours."""

    def __init__(self, number, *, why):
        super().__init__(f"{number}: {why}")
        self.number = number


class States(unittest.TestCase):

    def test_every_state_has_its_moves(self):
        self.assertEqual(set(pybgworker.MOVES), set(range(len(pybgworker.STATE_NAMES))))
        self.assertEqual(pybgworker.WAITING | pybgworker.FINISHED | {pybgworker.RUNNING},
                         set(pybgworker.MOVES))
        for state in pybgworker.FINISHED:
            self.assertEqual(pybgworker.MOVES[state], {pybgworker.QUEUED})

    def test_every_error_derives_from_one(self):
        errors = [v for v in vars(pybgworker).values()
                  if isinstance(v, type) and issubclass(v, Exception)
                  and v.__module__ == "pybgworker" and not v.__name__.startswith("_")]
        self.assertGreater(len(errors), 12)
        for error in errors:
            self.assertTrue(issubclass(error, pybgworker.PyBgWorkerError), error)
            self.assertTrue(error.__doc__, error)

    def test_an_error_is_one_line_with_its_parts(self):
        error = pybgworker.TaskError({"kind": "exception", "type": "ValueError",
                                      "message": "no", "traceback": "T"})
        self.assertEqual(error, "ValueError: no")
        self.assertEqual((error.kind, error.type, error.message, error.traceback),
                         ("exception", "ValueError", "no", "T"))

    def test_errors_survive_pickle_and_copy(self):
        kept = pybgworker.TaskError({"kind": "crash", "message": "m", "traceback": "T"})
        told = [pybgworker.TaskFailed(7, kept), pybgworker.Retry(30), Refused(3, why="w"),
                pybgworker.Retry("why", 5), pybgworker.Abort("why"), kept,
                CronError("61 * * * *", "minute", "61", "too late")]
        told += [e("said") for e in map(vars(pybgworker).get, pybgworker.__all__)
                 if isinstance(e, type) and issubclass(e, pybgworker.PyBgWorkerError)
                 and e not in map(type, told)]
        self.assertGreater(len(told), 18)
        ways = [lambda e, n=n: pickle.loads(pickle.dumps(e, n)) for n in range(6)]
        for error in told:
            for again in (*ways, copy.copy, copy.deepcopy):
                found = again(error)
                self.assertIs(type(found), type(error))
                self.assertEqual((str(found), str(vars(found))),
                                 (str(error), str(vars(error))))
        self.assertEqual(pickle.loads(pickle.dumps(told[0])).error.kind, "crash")

    def test_retry_takes_seconds_first_and_refuses_what_is_no_time(self):
        half = dt.timedelta(seconds=0.5)
        for arguments, message, countdown in (
            ((), "retry asked for", None), ((30,), "retry asked for", 30),
            ((half,), "retry asked for", 0.5), (("why",), "why", None),
            (("why", 2.5), "why", 2.5), ((5, 6), "5", 6),
        ):
            error = pybgworker.Retry(*arguments)
            self.assertEqual((str(error), error.countdown), (message, countdown))
        for wrong in (float("nan"), float("inf"), True, 10**10, dt.timedelta(10**6)):
            self.assertRaises(pybgworker.OptionError, pybgworker.Retry, wrong)
        self.assertRaises(ValueError, pybgworker.Retry, countdown="soon")


# == Time and values ==========================================================


class Values(unittest.TestCase):

    def trip(self, value):
        text = pybgworker.encode(value, "value")
        text.encode("ascii")
        return pybgworker.decode(text)

    def assert_arrives(self, value):
        found = self.trip(value)
        self.assertEqual(repr(found), repr(value))
        self.assertIs(type(found), type(value))

    def test_what_arrives_equals_what_was_sent(self):
        utc, plus = dt.timezone.utc, dt.timezone(dt.timedelta(hours=5, minutes=30))
        moment = dt.datetime(2026, 3, 29, 2, 30, 1, 123456)
        for value in (
            None, True, 0, -1, 2**63, 1.5, -0.0, 1e300, float("inf"),
            float("nan"), "", "ü€𝄞", "\ud800", "a\0b", [], [1, [2]], {}, {"a": {"b": 1}},
            (), (1, (2,)), {1: 2, None: 3}, {"$set": 1}, {"$": 1, "b": 2},
            {(1, 2): "t"}, b"", b"\0\xff", bytearray(b"x"), 1 + 2j, Decimal("1.10"),
            Decimal("NaN"), moment, moment.replace(tzinfo=utc), moment.replace(tzinfo=plus),
            moment.replace(fold=1), dt.date(1, 1, 1), dt.time(1, 2, 3, 4),
            dt.time(1, tzinfo=plus), dt.timedelta(-1, 2, 3), set(), frozenset({1}),
            [{"a": ({1}, [b"x"])}], pybgworker.importlib.import_module("uuid").UUID(int=7),
        ):
            with self.subTest(repr(value)[:60]):
                self.assert_arrives(value)

    def test_what_somebody_else_has_written_is_read_or_refused_as_json_is(self):
        self.assertEqual(pybgworker.decode(' [ 1,\n"x" ]\n'), [1, "x"])
        for text in ("", " ", "[1", "[1] x", "nul"):
            self.assertRaises(ValueError, pybgworker.decode, text)

    def test_an_integer_may_have_any_length(self):
        self.assertEqual(self.trip(10**5000 + 1), 10**5000 + 1)
        if hasattr(sys, "set_int_max_str_digits"):
            self.addCleanup(sys.set_int_max_str_digits, sys.get_int_max_str_digits())
            sys.set_int_max_str_digits(640)
        for digits in (600, 639, 640, 641, 2000):
            self.assertEqual(self.trip([10**digits + 1, -10**digits]),
                             [10**digits + 1, -10**digits])

    def test_any_text_arrives_also_one_that_is_no_unicode(self):
        parts = ["\ud83d", "\ude00", "\U0001f600", "\ud83d\ude00", "a", "\0", "ü", "$str"]
        for text in map("".join, itertools.product(parts, repeat=3)):
            for value in (text, {text: text}, [{text: 1, 2: (text,)}], {"$str": [text]}):
                self.assertEqual(self.trip(value), value)
        both = {"\ud83d\ude00": 1, "\U0001f600": 2}
        self.assertEqual(self.trip(both), both)

    def test_a_zone_arrives_by_its_name(self):
        zoneinfo = pybgworker.importlib.import_module("zoneinfo")
        zone = zoneinfo.ZoneInfo("Europe/Paris")
        for fold in (0, 1):
            self.assert_arrives(dt.datetime(2026, 10, 25, 2, 30, tzinfo=zone, fold=fold))

    def test_random_values_arrive(self):
        chance = random.Random(7)

        def value(depth):
            leaves = [lambda: chance.randrange(-10**20, 10**20), chance.random,
                      lambda: "".join(chance.choices("a\"\\$ü\n", k=5)),
                      lambda: None, lambda: chance.random() < 0.5]
            inner = [lambda: [value(depth - 1) for _ in range(chance.randrange(4))],
                     lambda: tuple(value(depth - 1) for _ in range(chance.randrange(4))),
                     lambda: {chance.choice(["a", "$b", 3, None]): value(depth - 1)}]
            return chance.choice(leaves + inner * (depth > 0) * 2)()

        for _ in range(500):
            self.assert_arrives(value(4))

    def test_what_cannot_arrive_is_refused_with_its_path(self):
        import collections
        import enum

        class User:
            pass

        class Colour(enum.IntEnum):
            RED = 1

        class Name(str):
            pass

        Point = collections.namedtuple("Point", "x y")
        for value, path in (
            (User(), "args[0]: "), ([1, {"user": User()}], 'args[0][1]["user"]: '),
            (Colour.RED, "args[0]: "), (Name("n"), "args[0]: "),
            (Point(1, 2), "args[0]: "), ((1, User()), "args[0][1]: "),
            (collections.OrderedDict(a=1), "args[0]: "), (print, "args[0]: "),
            ({User(): 1}, "args[0] (a key): "), ({3: User()}, "args[0][int]: "),
        ):
            with self.subTest(path), self.assertRaises(TypeError) as caught:
                pybgworker.encode_call((value,), {})
            self.assertTrue(str(caught.exception).startswith(path), caught.exception)
            self.assertIn("<class ", str(caught.exception))

    def test_keyword_arguments_are_named_in_messages(self):
        with self.assertRaisesRegex(TypeError, r'^kwargs\["who"\]: <class object>'):
            pybgworker.encode_call((), {"who": object()})

    def test_a_value_that_contains_itself_is_refused(self):
        loop = []
        loop.append(loop)
        with self.assertRaisesRegex(TypeError, "nested too deeply, or contains itself"):
            pybgworker.encode(loop, "value")

    def test_times_are_written_in_utc_with_milliseconds(self):
        self.assertEqual(pybgworker.iso_time(1_800_000_000_007), "2027-01-15T08:00:00.007Z")
        self.assertEqual(pybgworker.to_ms(0.0001), 1)
        self.assertEqual(pybgworker.iso_time(10**20), f"{10**20} ms")


# == Retry and rate ===========================================================


class RetryAndRate(unittest.TestCase):

    def test_delays_grow_up_to_their_longest(self):
        for policy, delays in (
            ({}, [1, 2, 4, 8]), ({"backoff": 1}, [1, 1, 1, 1]),
            ({"delay": 5, "max_delay": 12}, [5, 10, 12, 12]), ({"delay": 0}, [0, 0, 0, 0]),
            ({"backoff": 0.5, "delay": 8}, [8, 4, 2, 1]), ({"max_delay": 0}, [0] * 4),
        ):
            policy = RetryPolicy(jitter=0, **policy)
            found = [pybgworker.retry_delay(policy, n, 0.5) for n in (1, 2, 3, 4)]
            for a, b in zip(found, delays):
                self.assertAlmostEqual(a, b, 9, policy)

    def test_the_five_thousandth_attempt_does_not_overflow(self):
        self.assertEqual(pybgworker.retry_delay(RetryPolicy(jitter=0), 5000, 0.5), 3600)

    def test_jitter_is_a_fraction_to_both_sides(self):
        policy = RetryPolicy(jitter=0.1)
        self.assertAlmostEqual(pybgworker.retry_delay(policy, 1, 0.0), 0.9)
        self.assertAlmostEqual(pybgworker.retry_delay(policy, 1, 0.999999), 1.1, 4)

    def test_rates_are_numbers_or_numbers_per_unit(self):
        for text, rate in ((5, 5), (2.5, 2.5), ("5/s", 5), ("90/m", 1.5), ("36/h", 0.01)):
            self.assertEqual(pybgworker.parse_rate(text), rate)
        for text in (0, -1, "fast", "5/x", None, "", "1e9", float("nan"), "5/"):
            self.assertRaises(ValueError, pybgworker.parse_rate, text)

    def tat_after(self, tat, now, rate, starts):
        """The tat that is stored after so many more starts, whether they are allowed."""
        limits = pybgworker.Limits({"t": rate}, {}, lambda limit: tat, None, now)
        limits.opens_at("t")
        for _ in range(starts):
            limits.spend("t")
        return dict(limits.spent()).get("t", tat)

    def test_in_any_second_there_are_at_most_rate_plus_burst_starts(self):
        chance = random.Random(3)
        for rate in (0.5, 1, 3, 7.5, 40, 250):
            tat, now, starts = 0.0, 1_800_000_000_000, []
            for _ in range(400):
                now += chance.choice((0, 1, 3, 20, 400))
                count = min(chance.randrange(1, 9), pybgworker.rate_tokens(tat, now, rate))
                tat = self.tat_after(tat, now, rate, count)
                starts += [now] * count
            for i, at in enumerate(starts):
                window = [s for s in starts[i:] if s < at + 1000]
                self.assertLessEqual(len(window), rate + max(1, rate) + 1e-9)

    def starts_of(self, rate, looks):
        """When runs start, sorted; looks are (now, wanted, None or ms they are late)."""
        starts, tats = [], {}
        for now, wanted, late in looks:
            limits = pybgworker.Limits({"t": rate}, {}, lambda limit: tats.get(limit, 0),
                                       None, now)
            while wanted and limits.opens_at("t") is None:
                limits.spend("t", late is not None)
                starts.append(now + (late or 0))
                wanted -= 1
            tats.update(limits.spent())
        return sorted(starts)

    def test_what_waits_in_a_pipe_keeps_to_the_rate_by_when_it_starts(self):
        """However late it begins within its time; mixed with what begins at once."""
        latest, now = pybgworker.LATE_START_MS, self.NOW
        for rate in (20, 33, 250):
            late = [(now, math.ceil(rate / 10), latest)]    # then as much as there may be
            programs = [late + [(now + latest + ms, rate, None) for ms in range(0, 1200, 4)]]
            for seed in range(4):
                chance, at, program = random.Random(seed), now, []
                for _ in range(150):
                    at += chance.choice((0, 1, 3, 20, 50, 400, 1500))
                    program.append((at, chance.choice((1, 5, rate)),
                                    chance.choice((None, 0, 50, latest))))
                programs.append(program)
            for program in programs:
                starts = self.starts_of(rate, program)
                most = max(bisect.bisect_left(starts, at + 1000) - i
                           for i, at in enumerate(starts))
                with self.subTest(rate=rate, program=str(program)[:80]):
                    self.assertLessEqual(most, 2 * rate)
                    self.assertGreater(most, 1.6 * rate, "it is in use")

    def test_only_what_may_start_often_may_wait_in_a_pipe(self):
        for name, may in (("slow", False), ("fast", True), ("free", True)):
            for over_all in (19, 20):
                limits = pybgworker.Limits({"slow": 19, "fast": 20, "": over_all}, {},
                                           lambda limit: 0, None, self.NOW)
                self.assertIsNone(limits.opens_at(name))
                self.assertEqual(limits.may_wait(name), may and over_all == 20)

    NOW = 1_800_000_000_000

    def test_runs_at_a_time_are_counted_once_and_wait_for_an_end(self):
        asked = []

        def running(name, most):
            asked.append((name, most))
            return 3

        limits = pybgworker.Limits({"t": 1, "x": 1}, {"t": 4, "u": 3}, lambda limit: 0,
                                   running, self.NOW)
        self.assertEqual([limits.opens_at("t"), limits.opens_at("x")], [None, None])
        self.assertEqual(limits.spend("t"), (("t", 1000.0),))
        self.assertEqual([limits.opens_at("t"), limits.opens_at("u")], [math.inf] * 2)
        self.assertEqual((asked, limits.opens_at("v")), ([("t", 4), ("u", 3)], None))
        self.assertEqual([limit for limit, _ in limits.spent()], ["t"])

    def test_the_next_start_is_allowed_when_it_says_and_not_before(self):
        for rate in (0.3, 1, 7, 333):
            now = 1_800_000_000_000
            tat = self.tat_after(0, now, rate, pybgworker.rate_tokens(0, now, rate))
            at = pybgworker.rate_next_at(tat, now, rate)
            self.assertEqual(pybgworker.rate_tokens(tat, at - 1, rate), 0)
            self.assertEqual(pybgworker.rate_tokens(tat, at, rate), 1)

    def test_a_clock_set_back_or_another_limit_blocks_nobody(self):
        """`tat` is stored as it is: it must not stand in the way for as long."""
        for before, after, back in (
            (5, 5, 3_600_000), (1 / 3600, 10, 0), (1 / 60, 1 / 60, 86_400_000),
            (5, 5, 9_000), (1 / 3600, 0.5, 60_000),
        ):
            now = 1_800_000_000_000
            tat = self.tat_after(0, now, before, 1 + int(before - 0.5))
            now -= back
            starts = []
            for ms in range(0, 20_000, 100):
                if pybgworker.rate_tokens(tat, now + ms, after):
                    tat = self.tat_after(tat, now + ms, after, 1)
                    starts.append(ms)
            with self.subTest((before, after, back)):
                self.assertLessEqual(starts[0], 10_000)
                self.assertGreaterEqual(len(starts), min(1, int(after * 9)))

    def test_a_turn_that_waited_for_the_lock_spends_nothing_twice(self):
        now = 1_800_000_000_000
        tat = self.tat_after(0, now + 250, 5, 5)     # by another, meanwhile
        self.assertEqual(pybgworker.rate_tokens(tat, now, 5), 0)


# == Run counts ===============================================================


class Counting(unittest.TestCase):

    def ended(self, task_id=1, name="t", queue="q", state=pybgworker.SUCCESS, kind=None,
              waited=500, ran=0.2, run_at=10_000):
        """An outcome; with waited or ran None, one whose start or duration is unknown."""
        run = Run(task_id, name, queue, 0, 3, 0, None, run_at, None, "", 5)
        return Outcome(run, state, error=kind and {"kind": kind}, duration=ran,
                       started_at=None if waited is None else run_at + waited)

    def row(self, *outcomes):
        counts = pybgworker.RunCounts()
        counts.add(outcomes)
        row, = counts.rows(60, 120)
        return row

    ENDS = """
        state      kind       | counted as
        success    -          | succeeded
        failed     exception  | failed exceptions
        failed     crash      | failed crashed
        failed     timeout    | failed timeouts
        failed     lost       | failed lost
        failed     abort      | failed aborted
        failed     expired    | failed
        retrying   exception  | retried exceptions
        retrying   crash      | retried crashed
        retrying   timeout    | retried timeouts
        queued     lost       | retried lost
        cancelled  cancelled  | cancelled
        cancelled  exception  | cancelled exceptions
    """
    WORDS = ("succeeded", "failed", "retried", "cancelled", "exceptions", "crashed",
             "timeouts", "lost", "aborted")

    def test_each_end_is_counted_by_what_became_of_it_and_by_what_went_wrong(self):
        for line in self.ENDS.strip().splitlines()[1:]:
            state, kind, _, *wanted = line.split()
            row = self.row(self.ended(state=pybgworker.STATE_NAMES.index(state),
                                      kind=None if kind == "-" else kind))
            with self.subTest(line):
                self.assertEqual(row.runs, 1)
                self.assertEqual([word for word in self.WORDS if getattr(row, word)],
                                 wanted)

    def test_a_row_has_the_ids_the_sums_and_the_times_of_its_runs(self):
        row = self.row(self.ended(7, waited=1, ran=0.001), self.ended(3, waited=3, ran=7),
                       self.ended(5, waited=20_000_000, ran=20_000.0))
        self.assertEqual(row[:7], (60, 120, "t", "q", 3, 7, 3))
        self.assertEqual((row.ran_ms, row.waited_ms), (20_007_001, 20_000_004))
        self.assertEqual({n: count for n, count in enumerate(row.ran) if count},
                         {0: 1, 12: 1, 22: 1})      # a bound belongs to what is below it
        self.assertEqual({n: count for n, count in enumerate(row.waited) if count},
                         {0: 1, 2: 1, 22: 1})

    def test_a_run_without_times_is_counted_and_measures_nothing(self):
        row = self.row(self.ended(state=pybgworker.FAILED, kind="crash", waited=None),
                       self.ended(waited=3, ran=None))
        self.assertEqual((row.runs, sum(row.ran), sum(row.waited)), (2, 1, 1))
        counts = pybgworker.RunCounts()
        counts.add_lost(self.ended().run, pybgworker.FAILED)
        row, = counts.rows(60, 0)
        self.assertEqual((row.runs, row.failed, row.lost, sum(row.ran), row.lo),
                         (1, 1, 1, 0, 1))

    def test_what_was_cancelled_before_it_began_is_no_run(self):
        counts = pybgworker.RunCounts()
        counts.add([self.ended(state=pybgworker.CANCELLED, ran=None, waited=None)])
        self.assertEqual(counts.rows(60, 0), [])

    def test_a_clock_that_was_set_back_counts_as_no_time(self):
        row = self.row(self.ended(waited=-9000, ran=-1.0), self.ended(waited=7))
        self.assertEqual((row.ran_ms, row.waited_ms), (200, 7))
        self.assertEqual((row.ran[0], row.waited[0]), (1, 1))

    def test_a_thousand_groups_are_told_apart_and_the_rest_is_one(self):
        counts = pybgworker.RunCounts()
        counts.add([self.ended(n, f"t{n}") for n in range(1, 1003)])
        counts = counts.plus([self.ended(n, f"t{n}") for n in range(1, 1003)])
        rows = {row.name: row for row in counts.rows(60, 0)}
        self.assertEqual(len(rows), 1001)
        self.assertEqual(rows["t1000"].runs, 2)
        other = rows["(other)"]
        self.assertEqual((other.queue, other.runs, other.lo, other.hi),
                         ("(other)", 4, 1001, 1002))

    def test_plus_leaves_what_is_kept_as_it_is(self):
        counts = pybgworker.RunCounts()
        counts.add([self.ended(1), self.ended(2, state=pybgworker.FAILED, kind="abort")])
        both = counts.plus([self.ended(3), self.ended(4, "u")])
        self.assertEqual([(r.name, r.runs, r.failed, sum(r.ran), sum(r.waited), r.hi)
                          for r in both.rows(60, 0)],
                         [("t", 3, 1, 3, 3, 3), ("u", 1, 0, 1, 1, 4)])
        self.assertEqual([(r.name, r.runs, r.failed, sum(r.ran), sum(r.waited), r.hi)
                          for r in counts.rows(60, 0)], [("t", 2, 1, 2, 2, 2)])

    def test_merged_is_the_sum_and_has_what_all_rows_have(self):
        a, b = self.row(self.ended(4)), self.row(self.ended(9, waited=None))
        both = pybgworker.merged([a, b._replace(at=60, queue="r")])
        self.assertEqual(both[:7], (60, 60, "t", "", 4, 9, 2))
        self.assertEqual((sum(both.ran), sum(both.waited), both.ran_ms), (2, 1, 400))
        self.assertEqual(pybgworker.merged([a]), a)
        nothing = pybgworker.merged([])
        self.assertEqual((nothing.runs, nothing.name, len(nothing.ran)), (0, "", 23))

    QUANTILES = (
        ({}, 0.5, None),
        ({8: 4}, 0.5, 0.375), ({8: 4}, 1, 0.5), ({8: 4}, 0, 0.25),  # .25 … .5
        ({0: 1}, 0.5, 0.0005),
        ({0: 90, 9: 10}, 0.95, 0.75), ({0: 90, 9: 10}, 0.9, 0.001),
        ({22: 3}, 0.5, 10_000.0), ({0: 1, 22: 1}, 0.99, 10_000.0),
    )

    def test_quantiles_are_linear_within_a_bucket(self):
        for found, part, wanted in self.QUANTILES:
            counts = [found.get(n, 0) for n in range(23)]
            with self.subTest(found, part=part):
                value = pybgworker.quantile(counts, part)
                self.assertEqual(value if value is None else round(value, 6), wanted)


# == Printed ==================================================================


class Printing(unittest.TestCase):
    PART = pybgworker.OUTPUT_PART

    def kept_of_whole(self, text):
        """What is to be kept of this."""
        cut = len(text) - 2 * self.PART
        if cut <= 0:
            return text
        return text[:self.PART] + pybgworker.cut_mark(cut) + text[-self.PART:]

    def pieces(self, dice, most):
        """Texts of very different lengths, as many as make `most` characters."""
        size = 0
        while size < most:
            n = dice.choice((1, 2, 17, 300, 5000, 31_999, 32_000, 70_000))
            yield "".join(dice.choices("abc\n\0\u20ac\x1b", k=n))
            size += n

    def test_of_what_is_printed_the_beginning_and_the_end_are_kept(self):
        for seed in range(40):
            dice, kept, whole = random.Random(seed), pybgworker.Kept(), ""
            for piece in self.pieces(dice, dice.choice((10, 32_000, 64_000, 300_000))):
                kept.add(piece)
                whole += piece
                if dice.random() < 0.2:
                    self.assertEqual(kept.text(), self.kept_of_whole(whole), seed)
            self.assertEqual(kept.text(), self.kept_of_whole(whole), seed)
            self.assertEqual(kept.size, len(whole))

    def test_what_is_told_bit_by_bit_is_the_same_in_the_end(self):
        """Whatever is let go of what lies between the beginning and the end."""
        for seed in range(40):
            dice, kept, rows = random.Random(seed), pybgworker.Kept(), []
            for piece in self.pieces(dice, dice.choice((10, 64_000, 300_000))):
                kept.add(piece)
                if dice.random() < 0.3:
                    new = kept.untold()
                    self.assertTrue(all(len(body) <= pybgworker.OUTPUT_CHUNK
                                        for _, body in new))
                    rows += [pybgworker.OutputRow(seq, 0, body) for seq, body in new]
                    kept.told = kept.size
                    self.assertEqual(kept.untold(), [])
                    rows = [row for row in rows if row.seq < self.PART or row.seq
                            > kept.size - self.PART - pybgworker.OUTPUT_CHUNK]
            rows += [pybgworker.OutputRow(seq, 0, body) for seq, body in kept.untold()]
            self.assertEqual(pybgworker.kept_of(rows).text(), kept.text(), seed)

    def test_what_nobody_has_kept_is_counted_as_cut(self):
        kept = pybgworker.Kept()
        kept.add("a" * 70_000)
        kept.skip(1_000_000)
        kept.add("z" * 32_000)
        self.assertEqual(kept.text(), "a" * 32_000 + pybgworker.cut_mark(1_038_000)
                         + "z" * 32_000)
        self.assertEqual(kept.untold()[-1], (1_086_000, "z" * 16_000))

    def test_many_small_pieces_take_little_memory(self):
        kept = pybgworker.Kept()
        for _ in range(200_000):
            kept.add("x\n")
        self.assertLess(len(kept._tail) + len(kept._head), 1000)
        self.assertLess(sum(map(len, kept._tail)), 100_000)

    def test_a_mark_says_how_much_was_cut(self):
        for size, text in ((1, "1 characters"), (999, "999 characters"), (1000, "1.0 kB"),
                           (1_234_567, "1.2 MB"), (5 * 10**9, "5.0 GB")):
            self.assertEqual(pybgworker.cut_mark(size), f"\n… {text} cut …\n")


# == Functions ================================================================


class Functions(Case):

    def test_what_is_no_function_needs_a_name_or_is_refused(self):
        class Mailer:
            def send(self):
                pass

            def __call__(self):
                yield

        mailer, twice = Mailer(), pybgworker.functools.partial(print, 2)
        for fn in (twice, mailer.send):
            with self.assertRaisesRegex(pybgworker.OptionError, "name=") as caught:
                self.app.task(fn)
            self.assertEqual(str(caught.exception).count("@task of"), 1)
            self.assertNotIn("functools.functools", str(caught.exception))
        for name, fn in (("twice", twice), ("send", mailer.send)):
            self.assertEqual(self.app.task(name=name)(fn).name, name)

        async def ticks():
            yield 1

        with self.assertRaisesRegex(pybgworker.OptionError, "on_failure=.*not yield"):
            self.app.task(print, name="y", on_failure=ticks)
        for fn in (mailer, ticks, Mailer, Mailer.send, Mailer.__call__,
                   pybgworker.functools.partial(ticks)):
            self.assertRaises(pybgworker.OptionError, self.app.task(name="x"), fn)
        self.assertNotIn("x", self.app.tasks)

        def self_is_a_name(self):
            return self

        self.assertEqual(self.app.task(self_is_a_name)(3), 3)

    def test_two_functions_under_one_wrapper_are_an_error(self):
        wrapped = """
            def log(fn):
                def wrapper(*args):
                    return fn(*args)
                return wrapper
        """
        two = "@task\n@log\ndef charge(): pass\n\n@task\n@log\ndef refund(): pass\n"
        with self.assertRaisesRegex(pybgworker.AppError, r"functools.wraps"):
            self.module(textwrap.dedent(wrapped) + two)
        self.module(textwrap.dedent(wrapped).replace(
            "    def wrapper", "    import functools\n    @functools.wraps(fn)\n"
            "    def wrapper") + two)
        with self.assertRaisesRegex(pybgworker.AppError, "two tasks are named"):
            self.module("def make(n):\n  @task\n  def f(): return n\n  return f\n"
                        "make([]); make([])")
        with self.assertRaisesRegex(pybgworker.AppError, "two tasks are named"):
            self.module("import functools\nfor n in 1, 2:\n"
                        "  task(name='f')(functools.partial(print, n))")
        self.module("def setup():\n  @task\n  def f(a=[]): f.delay()\nsetup(); setup()")
        done = self.python(textwrap.dedent(wrapped) + "from pybgworker import task\n"
                           + two, check=False)
        self.assertIn("AppError: two tasks", done.stderr)

    def test_a_module_may_be_reloaded_with_wrappers_and_edits(self):
        (self.folder / "tools.py").write_text(
            "def log(fn):\n  def wrapper(): return fn()\n  return wrapper\n")
        source = ("from tools import log\nfrom pybgworker import task\n"
                  "@task\ndef a(): return {0}\n@task(name='b')\n@log\n"
                  "def b(): return {0}\n")
        code = """
            import importlib, pathlib, sys
            sys.dont_write_bytecode = True
            sys.path.insert(0, ".")
            path, source = pathlib.Path("jobs.py"), sys.argv[1]
            path.write_text(source.format(1))
            import jobs
            path.write_text("# moved\\n" + source.format(22))
            importlib.reload(jobs)
            print(jobs.a(), jobs.b(), sorted(jobs.task.__self__.tasks))
        """
        done = self.python(code, source)
        self.assertEqual(done.stdout, "22 22 ['b', 'jobs.a']\n")

    def test_a_module_that_its_package_imports_may_be_run_by_python_m(self):
        """The same `def` is executed twice, in two modules, under one name."""
        package = self.folder / "proj"
        package.mkdir()
        (package / "__init__.py").write_text("from .jobs import hello\n")
        (package / "jobs.py").write_text(
            "from pybgworker import task\n@task\ndef hello(): return 1\n"
            "if __name__ == '__main__': print(hello.delay().id)\n")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "proj.jobs"], cwd=self.folder,
            env=clean_environment(PYBGWORKER_DB=str(self.db)), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((done.stdout, done.stderr), ("1\n", ""))
        self.assertEqual(self.store.task(1).name, "proj.jobs.hello")

    def test_a_task_of_another_app_does_not_displace_one_of_its_name(self):
        def function():
            pass

        other = App(db=str(self.folder / "other.db"))
        ours = self.app.task(name="x")(lambda: None)
        self.app.task(other.task(name="x")(function), name="y")
        self.assertIs(self.app.tasks["x"], ours)
        self.assertIs(self.app.tasks["y"].fn, function)

    def test_two_tasks_of_one_name_are_an_error_and_a_reload_is_not(self):
        self.module("@task\ndef f(): pass")
        self.module("@task\ndef f(): return 1")
        with self.assertRaisesRegex(pybgworker.AppError, "two tasks are named 'tasks.f'"):
            self.module("@task\ndef f(): pass\n@task\ndef f(): return 2")
        with self.assertRaisesRegex(pybgworker.AppError, "two tasks are named 'same'"):
            self.module("@task(name='same')\ndef f(): pass\n"
                        "@task(name='same')\ndef g(): pass")


# == Waiting ==================================================================


class Waiting(QueueCase):

    def setUp(self):
        super().setUp()
        self.task = self.app.task(name="t")(print)
        self.asyncio = pybgworker.importlib.import_module("asyncio")

    def later(self, act):
        """Run it in a thread, so that the loop's own connection does not see it."""
        thread = threading.Thread(target=lambda: (act(), self.store.close()))
        self.addCleanup(thread.join)
        thread.start()

    def succeed(self, *results):
        """Finish them, as a worker in another process does."""
        ids = ", ".join(str(result.id) for result in results)
        self.sql(f"update bg_task set state = 4, result = '7' where id in ({ids})")

    def statements(self, busy):
        """What the loop's connection ran while it awaited a thousand tasks for long."""
        results, seen = self.task.delay_many([()] * 1000), []

        async def outcome(result):
            return await result

        async def run():
            waits = [self.asyncio.ensure_future(outcome(result)) for result in results]
            for _ in range(40):
                await self.asyncio.sleep(0)
            link = self.store.db.link()
            link.connection.set_trace_callback(seen.append)
            looks = 0
            while looks < 40:
                if busy:
                    await self.asyncio.get_running_loop().run_in_executor(
                        None, self.sql, "update bg_task set retries = retries + 1")
                await self.asyncio.sleep(0.002)
                looks = sum("data_version" in statement for statement in seen)
            link.connection.set_trace_callback(None)
            self.later(lambda: self.succeed(*results))
            return await self.asyncio.gather(*waits)

        self.assertEqual(self.asyncio.run(run()), [7] * 1000)
        self.assertEqual(self.app.watches, {})
        return seen

    def test_a_thousand_are_looked_for_together_and_only_after_a_commit(self):
        self.assertLess(len(self.statements(busy=True)), 41 * 11 + 20)
        self.assertLess(len(self.statements(busy=False)), 100)

    def test_one_of_many_is_seen_at_once_also_in_its_own_thread(self):
        results = self.task.delay_many([()] * 250)

        async def outcome(result):
            return await result

        async def run():
            waits = [self.asyncio.ensure_future(outcome(result)) for result in results]
            await self.asyncio.sleep(0.4)       # the pauses are at their longest
            started = time.monotonic()
            self.later(lambda: self.succeed(results[7]))
            self.assertEqual(await waits[7], 7)
            results[8].cancel()
            with self.assertRaises(pybgworker.TaskCancelled):
                await waits[8]
            self.later(results[9].forget)
            with self.assertRaises(pybgworker.TaskNotFound):
                await waits[9]
            last = self.task.delay()
            self.later(lambda: self.succeed(last))
            self.assertEqual(await last, 7)
            self.assertLess(time.monotonic() - started, 1.5)
            self.assertFalse(any(wait.done() for wait in waits[10:]))
            for wait in waits[10:]:
                wait.cancel()

        self.asyncio.run(run())

    def test_a_wait_that_is_cancelled_leaves_the_others(self):
        results = self.task.delay_many([()] * 3)

        async def run():
            for _ in range(3):
                with self.assertRaises(self.asyncio.TimeoutError):
                    await self.asyncio.wait_for(results[0]._wait(), 0.01)
            wait = self.asyncio.ensure_future(results[1]._wait())
            both = self.asyncio.ensure_future(results[1]._wait())
            await self.asyncio.sleep(0.01)
            both.cancel()
            self.later(lambda: self.succeed(results[1]))
            self.assertEqual(await wait, 7)
            while self.app.watches:
                await self.asyncio.sleep(0.001)

        self.asyncio.run(run())

    def test_a_loop_may_end_in_the_middle_and_two_may_run_at_once(self):
        first, second = self.task.delay_many([()] * 2)

        def die():
            loop = self.asyncio.new_event_loop()
            loop.run_until_complete(self.asyncio.wait([loop.create_task(first._wait())],
                                                      timeout=0.01))
            for wait in self.asyncio.all_tasks(loop):
                wait._log_destroy_pending = False
            loop.close()

        die()
        dead, = self.app.watches
        found = []
        self.later(lambda: found.append(self.asyncio.run(second._wait())))
        until(lambda: self.app.watches and dead not in self.app.watches)
        self.later(lambda: found.append(self.asyncio.run(second._wait())))
        self.succeed(second)
        until(lambda: found == [7, 7])
        self.assertEqual(self.app.watches, {})

    def test_what_goes_wrong_is_told_to_all_who_wait(self):
        results = self.task.delay_many([()] * 3)

        async def run():
            waits = [self.asyncio.ensure_future(result._wait()) for result in results]
            await self.asyncio.sleep(0.01)
            busy = pybgworker.DatabaseBusy("locked")
            with mock.patch.object(self.store, "version", side_effect=busy):
                return await self.asyncio.gather(*waits, return_exceptions=True)

        found = self.asyncio.run(run())
        self.assertEqual([type(e) for e in found], [pybgworker.DatabaseBusy] * 3)
        self.assertEqual(len(set(map(id, found))), 3)


# == Results ==================================================================


class Results(QueueCase):

    def test_what_is_kept_of_a_missing_row_is_not_found(self):
        result = self.task.delay()
        self.assertEqual((result.result, result.error, result.progress), (None,) * 3)
        result.forget()
        for what in ("result", "error", "progress", "attempt", "status"):
            for gone in (result, *(AsyncResult(2**n, self.app) for n in (50, 60, 63))):
                self.assertRaises(pybgworker.TaskNotFound, getattr, gone, what)
        self.assertRaises(pybgworker.TaskNotFound, self.store.output, result.id)

    def test_results_apps_and_tasks_survive_pickle_and_copy(self):
        result = self.task.delay()
        for found in (copy.copy(result), copy.deepcopy(result)):
            self.assertIs(found._app, self.app)
        found = pickle.loads(pickle.dumps([result, self.app]))
        self.assertEqual(found[0], result)
        self.assertEqual((found[0].status, found[0]._app), ("queued", found[1]))
        found[1].store.close()

        code = """
            import concurrent.futures, copy, multiprocessing, pickle, sys
            from pybgworker import AsyncResult, Cron, configure, task
            @task
            def double(n): return 2 * n
            def outcome(result):
                return result.get(timeout=20)
            if __name__ == "__main__":
                context = multiprocessing.get_context("spawn")
                failed = AsyncResult(int(sys.argv[1]))
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                    print(list(pool.map(double, [1, 2])))
                    print(repr(pool.submit(outcome, failed).exception()))
                cron = Cron("0 1 * * *")
                assert pickle.loads(pickle.dumps(cron)) == copy.copy(cron) == cron
        """
        (self.folder / "script.py").write_text(textwrap.dedent(code))
        failed = self.finished(pybgworker.FAILED, error={"kind": "crash", "message": "m"})
        done = subprocess.run(
            [sys.executable, "script.py", str(failed.id)], cwd=self.folder, text=True,
            env=clean_environment(PYBGWORKER_DB=str(self.db)), stdout=subprocess.PIPE)
        self.assertEqual(done.stdout.splitlines(), [
            "[2, 4]", f"TaskFailed('task {failed.id} failed: crash: m')"])

    def setUp(self):
        super().setUp()
        self.task = self.app.task(name="t")(print)

    def finished(self, state, **values):
        result = self.task.delay()
        self.now = pybgworker.now_ms()
        run = self.claim()[-1]
        self.finish(run, state, **values)
        return result

    def test_a_result_is_read_as_often_as_one_likes(self):
        result = self.finished(pybgworker.SUCCESS, result='{"$tuple":[1]}')
        self.assertEqual((result.get(), result.get(timeout=0)), ((1,), (1,)))
        self.assertEqual((result.ready(), result.successful(), result.failed()),
                         (True, True, False))
        self.assertEqual(AsyncResult(result.id, self.app), result)
        self.assertEqual(result.task_id, result.id)

    def test_get_raises_what_became_of_it(self):
        error = {"kind": "exception", "type": "E", "message": "m", "traceback": "T"}
        failed = self.finished(pybgworker.FAILED, error=error)
        with self.assertRaises(pybgworker.TaskFailed) as caught:
            failed.get()
        self.assertEqual((caught.exception.error_type, caught.exception.traceback),
                         ("E", "T"))
        self.assertEqual(failed.error, "E: m")
        cancelled = self.finished(pybgworker.CANCELLED)
        self.assertRaises(pybgworker.TaskCancelled, cancelled.get)
        self.assertTrue(cancelled.cancelled())

    def test_a_retry_just_when_it_is_read_is_waited_for(self):
        result = self.finished(pybgworker.SUCCESS, result="7")
        with mock.patch.object(AsyncResult, "ready", lambda self: True):
            result.retry()          # between the look and the reading
            with self.assertRaisesRegex(TimeoutError, "is queued"):
                result.get(timeout=0.02)

    def test_get_gives_up_after_its_timeout(self):
        result = self.task.delay()
        with self.assertRaisesRegex(pybgworker.WaitTimeout, f"task {result.id} is queued"):
            result.get(timeout=0.02)

    def test_a_result_can_be_awaited(self):
        result = self.finished(pybgworker.SUCCESS, result="7")

        async def wait():
            return await result

        asyncio = pybgworker.importlib.import_module("asyncio")
        self.assertEqual(asyncio.run(wait()), 7)

    def test_cancel_retry_and_forget(self):
        result = self.task.delay()
        self.assertTrue(result.cancel())
        self.assertFalse(result.cancel())
        result.retry()
        self.assertEqual(result.status, "queued")
        result.forget()
        for read in (lambda: result.status, result.ready, result.get, result.cancel,
                     result.retry, result.forget):
            self.assertRaises(pybgworker.TaskNotFound, read)

    def test_times_are_those_of_the_stores_clock(self):
        for hours, status in (5, "queued"), (-5, "scheduled"):
            now = self.now + hours * 3_600_000
            with mock.patch.object(pybgworker.SqliteStore, "now", return_value=now):
                result = self.app.send("t", eta=dt.datetime.fromtimestamp(
                    self.now / 1000 + 1))
                again = self.app.send("t", countdown=60)
                self.assertEqual(self.store.task(again.id).run_at, now + 60_000)
                self.assertEqual(self.store.task(result.id).created_at, now)
                again.cancel()
                self.assertEqual(self.store.task(again.id).finished_at, now)
                again.retry()
                self.assertEqual(self.store.task(again.id).run_at, now)
            self.assertEqual(result.status, status)

    def test_an_id_that_is_no_number_is_not_found(self):
        for wrong in ("abc", "", None, "-1", 1.5, "1 or 1", True):
            self.assertRaises(pybgworker.TaskNotFound, AsyncResult, wrong)
        self.assertEqual(AsyncResult("7", self.app).id, 7)

    def test_outside_of_a_task_there_is_no_current_one(self):
        self.assertIsNone(pybgworker.current_task())


# == Tasks ====================================================================


class Tasks(Case):

    def test_a_decorated_function_is_still_a_function(self):
        @self.app.task
        def add(a, b=1):
            """Add."""
            return a + b

        self.assertEqual((add(1, 2), add(1)), (3, 2))
        self.assertEqual((add.__name__, add.__doc__), ("add", "Add."))
        self.assertTrue(add.name.endswith(".add"))

    def test_options_of_the_decorator_are_checked_where_it_stands(self):
        for options, message in (
            ({"retries": -1}, "retries=-1"), ({"retries": True}, "retries=True"),
            ({"timeout": 0}, "timeout=0"), ({"rate_limit": "often"}, "rate_limit='often'"),
            ({"max_running": 0}, "max_running=0"), ({"max_running": "3"}, "max_running='3'"),
            ({"max_running": True}, "max_running=True"),
            ({"max_running": 1.5}, "max_running=1.5"),
            ({"priority": "high"}, "priority='high'"), ({"queue": ""}, "queue=''"),
            ({"retry_for": "x"}, "retry_for='x'"), ({"nonsense": 1}, "nonsense"),
            ({"retry_delay": float("nan")}, "retry_delay=nan"),
            ({"retry_jitter": 1.5}, "from 0 to 1"), ({"retry_jitter": -1}, "from 0"),
        ):
            with self.subTest(message), self.assertRaises((ValueError, TypeError)) as e:
                self.app.task(**options)(print)
            self.assertIn(message, str(e.exception))

    def test_callbacks_are_tasks_beside_their_task(self):
        app = self.app

        @app.task(name="t", on_success=print, on_failure=self.app.task(len, name="l"))
        def first():
            pass

        self.assertEqual(sorted(app.tasks), ["l", "t", "t:on_failure", "t:on_success"])
        self.assertEqual(app.tasks["t"].callbacks, 3)
        app.task(first, name="t")           # @task again, without any
        self.assertEqual(sorted(app.tasks), ["l", "t"])
        with self.assertRaisesRegex(pybgworker.AppError, "callbacks of tasks"):
            app.task(print, name="t:on_failure")
        with self.assertRaisesRegex(ValueError, "on_success='f': must be a function"):
            app.task(on_success="f")(print)

    def test_what_refuses_an_option_is_one_kind_of_error(self):
        task = self.app.task(print)
        for wrong in (
            lambda: self.app.task(retries=-1), lambda: self.app.task(nonsense=1),
            lambda: self.app.task(on_failure="me"), lambda: self.app.task(retry_jitter=2),
            lambda: self.app.task(queue="a,b"), lambda: self.app.task(queue=" a"),
            lambda: self.app.task(name="\ud800"), lambda: self.app.task(retry_delay=1e10),
        ):
            self.assertRaises(pybgworker.OptionError, wrong(), print)
        for wrong in (
            lambda: task.options(nonsense=1), lambda: task.options(queue="a ").delay(),
            lambda: task.options(timeout=10**10).delay(),
            lambda: task.options(countdown=10**10).delay(),
            lambda: task.options(eta=dt.datetime.min).delay(),
            lambda: task.options(key="a\0").delay(), lambda: task.delay_many(["ab"]),
            lambda: task.delay_many([{1: 2}]), lambda: self.app.task(5),
            lambda: self.app.cron("* * * * *", jitter=1e10),
        ):
            self.assertRaises(pybgworker.OptionError, wrong)
        self.assertTrue(issubclass(pybgworker.OptionError, ValueError))
        self.assertTrue(issubclass(pybgworker.OptionError, TypeError))

    def test_any_value_of_any_option_is_refused_as_such_or_can_be_stored(self):
        base = dt.datetime.min.replace(tzinfo=dt.timezone(dt.timedelta(hours=14)))
        values = [None, True, 0, -1, 3, 2.5, 10**9, 10**30, 1e-300, 1e300, float("nan"),
                  float("inf"), "", "x", "a,b", "5/s", "7d", "\ud800", "a\0b", b"x", [], [1],
                  (), {}, object(), print, ValueError, (KeyError,), dt.timedelta(1),
                  dt.timedelta.max, dt.datetime.min, dt.datetime.max, base, Decimal("NaN"),
                  sqlite3.connect(":memory:")]
        task = self.app.task(print)
        for value, option in itertools.product(values, sorted(pybgworker.CALL_OPTIONS)):
            with contextlib.suppress(pybgworker.OptionError):
                task.options(**{option: value}).delay()
        for value, option in itertools.product(values, sorted(pybgworker.TASK_OPTIONS)):
            with contextlib.suppress(pybgworker.OptionError):
                pybgworker.Task(self.app, print, "odd", {option: value}).delay()
        for value, setting in itertools.product(values, pybgworker.SETTINGS):
            with contextlib.suppress(pybgworker.SettingError):
                _ = App(**{setting.name: value}).settings
        self.assertGreater(len(self.store.tasks(limit=1000)), 70)
        values[-1].close()

    def test_the_longest_time_that_is_accepted_works(self):
        longest = dt.timedelta(seconds=10**9)
        task = self.app.task(timeout=10**9, retry_delay=10**9, retry_max_delay=10**9,
                             retry_jitter=1)(print)
        for options in ({"countdown": longest}, {"eta": dt.datetime(9999, 12, 30)},
                        {"timeout": longest, "countdown": -10**9}):
            self.store.task(task.options(**options).delay().id)
        old = signal.setitimer(signal.ITIMER_REAL, task.timeout)
        signal.setitimer(signal.ITIMER_REAL, *old)

    def test_any_keyword_reaches_the_function(self):
        seen = self.app.task(name="seen")(lambda *args, **kwargs: kwargs)
        words = dict.fromkeys(("self", "task", "args", "kwargs", "calls", "options", "fn",
                               "name", "countdown", "text", "connection"), 1)
        self.assertEqual(seen(**words), words)
        for result in (seen.delay(**words), seen.options(retries=1).delay(**words),
                       seen.apply_async(kwargs=words), seen.delay_many([words])[0]):
            text = self.store.args(result.id)
            self.assertEqual(pybgworker.decode(text), [[], words])

    def test_attributes_of_a_function_replace_no_option(self):
        def f():
            pass

        vars(f).update(timeout="x", name="y", queue="z", policy=1, delay=2, colour="red",
                       schedules=3, app=4, rate_limit=5)
        task = self.app.task(name="f", queue="q", timeout=7)(f)
        self.assertEqual((task.name, task.queue, task.timeout, task.rate_limit, task.app),
                         ("f", "q", 7, None, self.app))
        self.assertEqual((task.policy.retries, task.schedules, task.colour), (3, [], "red"))
        self.assertEqual(task.delay().status, "queued")

    def test_a_scripts_tasks_are_named_by_its_file(self):
        path = self.folder / "script.py"
        path.write_text("from pybgworker import task\n@task\ndef f(): pass\nprint(f.name)")
        for argv in ([str(path)], ["-m", "script"]):
            done = subprocess.run([sys.executable, *argv], cwd=self.folder, text=True,
                                  env=clean_environment(), stdout=subprocess.PIPE)
            self.assertEqual(done.stdout, "script.f\n")

    def test_cron_and_task_go_in_either_order(self):
        module = self.module("""
            @task(name="a", queue="q")
            @cron("*/5 * * * *")
            def a(): pass

            @cron("0 1 * * *", tz="Europe/Paris", misfire="skip")
            @task(name="b", queue="q")
            def b(): pass

            @cron("0 1 * * *")
            def c(): pass
        """)
        tasks = pybgworker.default_app.tasks
        self.assertEqual(set(tasks), {"a", "b", "tasks.c"})
        self.assertEqual([len(t.schedules) for t in tasks.values()], [1, 1, 1])
        self.assertEqual((module.a.queue, module.b.schedules[0].misfire), ("q", "skip"))

    def test_a_bad_schedule_is_an_error_where_it_stands(self):
        for arguments, error in (
            (("61 * * * *",), CronError), (("0 0 30 2 *",), CronError),
            (("* * * * *", "Mars/Base"), CronError),
            (("* * * * *", "UTC", "never"), ValueError),
            (("* * * * *", "UTC", "latest", "perhaps"), ValueError),
        ):
            self.assertRaises(error, self.app.cron, *arguments)

    def test_what_cron_runs_needs_no_arguments(self):
        cron = self.app.cron("* * * * *")
        for needs in (lambda a: a, lambda a, b=1: a, lambda *, a: a,
                      self.app.task(name="x")(lambda a, *, b=1: a)):
            with self.assertRaisesRegex(pybgworker.OptionError, "without arguments"):
                App().cron("* * * * *")(needs)
        for number, fine in enumerate((lambda: 1, lambda a=1, *b, c=2, **d: 1)):
            cron(self.app.task(fine, name=f"fine{number}"))

    def test_options_of_a_call_go_before_those_of_the_task(self):
        task = self.app.task(queue="a", priority=3)(print)
        result = task.options(queue="b", priority=1, retries=0, timeout=2.5).delay()
        row = self.store.task(result.id)
        self.assertEqual((row.queue, row.priority, row.retries, row.timeout),
                         ("b", 1, 0, 2.5))
        row = self.store.task(task.apply_async((1,), {"a": 2}, countdown=10).id)
        self.assertEqual((row.queue, row.status), ("a", "scheduled"))

    def test_countdown_and_eta_say_when(self):
        task = self.app.task(print)
        soon = dt.timedelta(seconds=10)
        aware = dt.datetime.now(dt.timezone.utc) + soon
        for options in ({"countdown": 10}, {"countdown": soon}, {"eta": aware},
                        {"eta": dt.datetime.now() + soon}):
            row = self.store.task(task.options(**options).delay().id)
            with self.subTest(options):
                self.assertEqual(row.status, "scheduled")
                self.assertAlmostEqual(row.run_at - row.created_at, 10_000, delta=900)
        past = self.store.task(task.options(eta=dt.datetime(2000, 1, 1)).delay().id)
        self.assertEqual(past.status, "queued")

    def test_whoever_takes_seconds_takes_a_timedelta(self):
        span = dt.timedelta(minutes=1)
        task = self.app.cron("* * * * *", jitter=span)(self.app.task(
            timeout=span, retry_delay=span, retry_max_delay=span)(print))
        retry = pybgworker.Retry(countdown=span)
        schedule, = task.schedules
        self.assertEqual({task.timeout, task.policy.delay, task.policy.max_delay,
                          schedule.jitter, retry.countdown}, {60.0})

    def test_bad_options_of_a_call_are_refused(self):
        task = self.app.task(print)
        for options in (
            {"nonsense": 1}, {"countdown": 1, "eta": dt.datetime.now()}, {"eta": 5},
            {"countdown": "soon"}, {"retries": -1}, {"key": ""}, {"priority": 1.5},
            {"countdown": float("nan")}, {"countdown": float("inf")},
            {"retries": 10**30}, {"timeout": float("inf")}, {"priority": 1 << 40},
        ):
            with self.subTest(options), self.assertRaises((TypeError, ValueError)):
                task.options(**options).delay()
        for call, words in (
            (lambda: task.options(countdown="x").delay(), "or a timedelta"),
            (lambda: task.options(retries=1.5).delay(), "a whole number from 0"),
            (lambda: task.delay().get(timeout="x"), "or a timedelta"),
            (lambda: task.apply_async(1, 2), r"apply_async\(\(1, 2\), .*delay\(1, 2"),
            (lambda: task.apply_async("ab"), "takes a tuple of positional"),
            (lambda: task.apply_async((), [1]), "a dict of keyword arguments"),
            (lambda: self.app.send("t", countdwn=3), "unknown option 'countdwn'; there"),
            (lambda: self.app.send("t", conn=3, fn=4), "unknown option 'fn'; there"),
            (lambda: self.app.send("t", kwargs=3), "a dict of keyword arguments"),
        ):
            with self.assertRaisesRegex(pybgworker.OptionError, words):
                call()
        self.sql("delete from bg_task")
        self.assertRaises(ValueError, task.options(key="k").delay_many, [(), ()])
        self.assertRaises(TypeError, task.delay_many, [1])
        self.store.data_version()
        self.assertEqual(task.delay_many([]), [])
        self.assertEqual(self.sql("select count(*) from bg_task"), [(0,)])

    def test_arguments_over_the_limit_are_refused_with_its_name(self):
        self.app.configure(max_payload=1000)
        task = self.app.task(print)
        with self.assertRaisesRegex(pybgworker.PayloadTooLarge, "PYBGWORKER_MAX_PAYLOAD"):
            task.delay("x" * 2000)

    def held(self, where, name):
        """Hold up who calls this first; return (its thread's results, let it go)."""
        held, go, old = threading.Event(), threading.Event(), where[name]

        def hold(*args):
            where[name] = old
            held.set()
            go.wait(20)
            return old(*args)

        where[name] = hold
        results = []
        thread = threading.Thread(target=lambda: results.append(self.app.store))
        thread.start()
        self.assertTrue(held.wait(20))
        return results, lambda: (go.set(), thread.join())

    def test_an_app_has_one_store_whoever_opens_it_first(self):
        self.app.configure(busy_timeout=5)
        results, let_go = self.held(pybgworker.STORES, "")
        store = self.app.store
        let_go()
        self.assertIs(results[0], store)
        self.assertIs(self.app.store, store)

    def test_the_scheme_of_the_database_says_who_keeps_it(self):
        made = []
        with mock.patch.dict(pybgworker.STORES, {"mine": made.append}):
            App(db="mine://host/1").store
        self.assertEqual([settings.db for settings in made], ["mine://host/1"])
        with self.assertRaisesRegex(pybgworker.SettingError, "at mine://; give the path"):
            App(db="mine://host/1").store
        self.assertIsInstance(App(db=str(self.folder / "a:b")).store, SqliteStore)

    def test_what_is_configured_while_another_thread_looks_is_not_lost(self):
        self.app.configure(busy_timeout=5)
        _, let_go = self.held(vars(pybgworker), "resolve_settings")
        self.app.configure(busy_timeout=7)
        let_go()
        self.assertEqual(self.app.settings.busy_timeout, 7)
        self.assertEqual(self.app.store.db.busy_timeout, 7)

    def test_a_fork_while_another_thread_opens_the_store_does_not_matter(self):
        self.app.configure(busy_timeout=5)
        _, let_go = self.held(pybgworker.STORES, "")
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            os._exit(self.app.store.name != str(self.db))
        let_go()
        self.assertEqual(os.waitpid(pid, 0)[1], 0)

    def test_an_app_is_found_by_its_name_or_as_the_only_one(self):
        (self.folder / "two.py").write_text(
            "from pybgworker import App\nother = App()\n@other.task\ndef f(): pass\n"
            "RATE_LIMIT = '5/s'\n")
        code = """
            import sys, pybgworker as p
            sys.path.insert(0, ".")
            for spec in ("two", "two:other"):
                app = p.load_app(spec)
                print(sorted(app.tasks), app.settings.rate_limit)
            try: p.load_app("two:f")
            except p.AppError as e: print(e)
        """
        lines = self.python(code).stdout.splitlines()
        self.assertEqual(lines[:2], ["['two.f'] 5.0"] * 2)
        self.assertIn("has no App 'f'", lines[2])


class Types(Case):
    """What a type checker knows of a program that uses this file."""

    PROGRAM = """
        from pybgworker import App, AsyncResult, Task, cron, task

        @task
        def add(a: int, b: int = 0) -> int:
            return a + b

        @task(retries=0)
        async def fetch(url: str) -> bytes:
            return add(1, 2).to_bytes(4, "big")

        @cron("0 3 * * *")
        def nightly() -> float:
            return 1.0

        @App().task(name="later")
        def later(*names: str, **options: bool) -> list[str]:
            return [*names, *options]

        async def main() -> None:
            body: bytes = await fetch("direct")
            body = await fetch.delay("queued")
            body.upper()

        number: int = add.delay(1, 2).get(timeout=3)
        number = add.options(countdown=3).delay(1).get()
        number = add.apply_async((1, 2)).get()
        numbers: list[AsyncResult[int]] = add.delay_many([(1, 2)])
        body: bytes = fetch.delay("x").get()
        maybe: float | None = nightly.delay().result
        later.delay("a", "b", loud=True)
        App().send("any", 1).get().anything()

        add.delay("1")                          # wrong: int
        add.delay()                             # wrong: a is missing
        add.options(priority=1).delay(1, c=2)   # wrong: no c
        fetch.delay(3)                          # wrong: str
        later.delay(1)                          # wrong: str
        text: str = add.delay(1).get()          # wrong: int
        fetch.delay("x").get().items()          # wrong: bytes
        nightly.delay(1)                        # wrong: takes nothing
    """

    @unittest.skipUnless(shutil.which("mypy"), "needs mypy")
    def test_a_checker_finds_wrong_arguments_and_knows_what_get_returns(self):
        program = self.folder / "program.py"
        program.write_text("from __future__ import annotations\n"
                           + textwrap.dedent(self.PROGRAM))
        shutil.copy(HERE / "pybgworker.py", self.folder)
        found = subprocess.run(
            ["mypy", "--strict", "--follow-imports=silent", "--config-file=",
             "--python-version=3.10", "--cache-dir", os.devnull, "program.py"],
            cwd=self.folder, capture_output=True, text=True, timeout=300)
        lines = program.read_text().splitlines()
        wrong = [n for n, line in enumerate(lines, 1) if "# wrong:" in line]
        said = {int(n) for n in re.findall(r"program\.py:(\d+): error", found.stdout)}
        self.assertEqual(sorted(said), wrong, found.stdout + found.stderr)


# == Wake-up ==================================================================


class WakeUps(unittest.TestCase):

    def test_a_hint_is_heard_and_noise_is_not(self):
        ear = pybgworker.WakeSocket()
        self.addCleanup(ear.close)
        self.assertFalse(ear.drain())
        pybgworker.send_wake_ups([(ear.port, "somebody else")])
        pybgworker.send_wake_ups([(ear.port, ear.token)])
        self.assertTrue(until(ear.drain))
        self.assertFalse(ear.drain())

    def test_a_hint_to_nobody_is_no_error(self):
        ear = pybgworker.WakeSocket()
        ear.close()
        ear.close()
        pybgworker.send_wake_ups([(ear.port, ear.token), (0, "")])
        self.assertFalse(ear.drain())

    def test_an_ear_that_somebody_has_closed_hears_nothing(self):
        ear = pybgworker.WakeSocket()
        os.close(ear.socket.detach())
        thread = threading.Thread(target=ear.drain, daemon=True)
        thread.start()
        thread.join(5)
        self.assertFalse(thread.is_alive())


# == Forks ====================================================================


NEEDS_OWN_LOCKS = unittest.skipUnless(
    pybgworker._HAS_OWN_LOCKS, "needs locks of open files")
# From 3.51 on it notices by itself that a stray close() has dropped its locks.
NEEDS_OLDER_SQLITE = unittest.skipUnless(
    sqlite3.sqlite_version_info < (3, 51), "needs a SQLite before 3.51")


@unittest.skipUnless(hasattr(os, "fork"), "needs fork")
class Forking(Case):
    """Parent and child both enqueue for as long as they live; nothing is lost."""

    PROGRAM = """
        import contextlib, ctypes, os, signal, sqlite3, sys, threading, time, warnings
        import pybgworker as p
        warnings.simplefilter("ignore")
        signal.alarm(50)
        app = p.App(); t = p.Task(app, print, "t", {})

        def say(*words):
            os.write(1, (" ".join(map(str, words)) + chr(10)).encode())

        def delay(*args):
            say("id", t.delay(*args).id)

        class Signs:
            # Who waits for a sign that the other will never give has failed.
            def __init__(self):
                self.ends = os.pipe()
            def give(self):
                os.write(self.ends[1], b".")
            def wait(self):
                os.read(self.ends[0], 1)

        def end():
            # As sys.exit does, but for the streams: connections are closed.
            del t.app
            app.store.close()
            os._exit(0)
    """

    def ran(self, code, **options):
        """What a program says; all ids that it got are tasks, and nothing else."""
        code = textwrap.dedent(self.PROGRAM) + textwrap.dedent(code)
        done = self.python(code, **options)
        self.assertEqual(done.stderr, "")
        said = done.stdout.splitlines()
        ids = [int(line.split()[1]) for line in said if line.startswith("id ")]
        self.assertEqual(len(ids), len(set(ids)))
        kept = self.sql("select id from bg_task order by id")
        self.assertEqual([row[0] for row in kept], sorted(ids))
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])
        return said

    def test_a_daemon_enqueues_on_when_its_parents_have_ended(self):
        said = self.ran("""
            delay()
            first, second, gone = os.getpid(), Signs(), Signs()
            for _ in range(2):                  # the usual double fork
                if os.fork():
                    sys.exit(0)
                os.setsid() if _ == 0 else None
            while os.getppid() == first:
                time.sleep(0.01)
            for i in range(30):
                delay(i)
        """)
        self.assertEqual(len(said), 31)

    def test_both_enqueue_whoever_ends_first(self):
        for first in ("parent", "child"):
            with self.subTest(first):
                self.tearDown()
                self.setUp()
                said = self.ran(f"""
                    delay()
                    to_parent, to_child = Signs(), Signs()
                    who = "parent" if os.fork() else "child"
                    mine, other = ((to_parent, to_child) if who == "parent"
                                   else (to_child, to_parent))
                    delay()
                    other.give(); mine.wait()
                    delay()
                    if who == {first!r}:
                        app.store.close()
                        other.give()
                        os._exit(0)
                    mine.wait()
                    [delay(i) for i in range(5)]
                    if who == "parent":
                        os.wait()
                    else:
                        sys.exit()
                """)
                self.assertEqual(len(said), 10)

    def test_multiprocessing_forks_children_that_enqueue(self):
        said = self.ran("""
            import multiprocessing
            context = multiprocessing.get_context("fork")
            def work(n):
                delay(n)
                return os.getpid()
            delay()
            for _ in range(2):
                with context.Pool(3) as pool:
                    pool.map(work, range(12), 1)
                delay()
        """)
        self.assertEqual(len(said), 27)

    def test_a_fork_while_eight_threads_enqueue(self):
        said = self.ran("""
            going = True
            def go():
                while going:
                    delay()
            threads = [threading.Thread(target=go) for _ in range(8)]
            [thread.start() for thread in threads]
            for _ in range(12):
                start = time.monotonic()
                pid = os.fork()
                if pid == 0:
                    [delay() for _ in range(3)]
                    say("child", time.monotonic() - start < 4)
                    os._exit(0)
                os.waitpid(pid, 0)
            going = False
            [thread.join() for thread in threads]
            delay()
        """)
        self.assertEqual(said.count("child True"), 12)

    def test_a_fork_inside_a_transaction_undoes_it_in_both(self):
        said = self.ran("""
            delay()
            try:
                with app.store.db.write():
                    app.store.pause
                    app.store.db.link().connection.execute("delete from bg_task")
                    pid = os.fork()
            except p.DatabaseUnavailable as exc:
                say("undone", "forked" in str(exc), "do it again" in str(exc))
            delay()
            os.waitpid(pid, 0) if pid else os._exit(0)
            delay()
        """)
        self.assertEqual(said.count("undone True True"), 2)
        self.assertEqual(len(said), 6)

    def test_a_fork_by_a_signal_handler_in_a_delay(self):
        """It happens once, in the parent; the child has forgotten the others too."""
        said = self.ran("""
            insert = p.insert_all
            def forking(*args):
                insert(*args)
                p.insert_all = insert
                global pid
                pid = os.fork()
            delay()
            p.insert_all = forking
            try:
                delay()
            except p.DatabaseUnavailable as exc:
                say("child", pid == 0, "forked" in str(exc))
            delay()
            os.waitpid(pid, 0) if pid else os._exit(0)
        """)
        self.assertEqual(said.count("child True True"), 1)
        self.assertEqual(len(said), 5)

    @NEEDS_OWN_LOCKS
    def test_a_fork_by_what_interrupts_a_call_of_sqlite(self):
        """A trace function here: it forks once in each line that enqueues."""
        said = self.ran("""
            seen, pids, children = set(), [], []
            def trace(frame, event, _):
                name, where = frame.f_code.co_name, (frame.f_code, frame.f_lineno)
                while name.startswith("<") and frame.f_back:
                    frame = frame.f_back
                    name = frame.f_code.co_name
                mine = frame.f_code.co_filename == p.__file__ and (
                    name in ("_insert", "_next_id", "read"))
                if event == "line" and mine and where not in seen:
                    seen.add(where)
                    pids.append(os.fork())
                    if pids[-1] == 0:
                        sys.settrace(None)
                        raise SystemExit
                return trace
            delay()
            sys.settrace(trace)
            while True:
                before = len(seen)
                try:
                    [say("id", result.id) for result in t.delay_many([(1,), (2,)])]
                    p.AsyncResult(1, app).status
                except SystemExit:
                    delay()                     # the child enqueues on
                    os._exit(0)
                except p.DatabaseUnavailable:   # undone too often: once more
                    continue
                if len(seen) == before:
                    break
            sys.settrace(None)
            say("lines", len(seen) > 5, {os.waitpid(pid, 0)[1] for pid in pids})
            delay()
        """)
        self.assertIn("lines True {0}", said)

    @NEEDS_OWN_LOCKS
    def test_a_fork_right_after_a_commit_is_no_loss_of_the_log(self):
        """By a signal handler: what takes long there is the commit."""
        self.python("""
            import os, pybgworker as p
            from pybgworker import task

            @task
            def t(): pass

            class Forking:
                def __init__(self, connection):
                    self.connection = connection

                def __getattr__(self, name):
                    return getattr(self.connection, name)

                def execute(self, statement, *values):
                    found = self.connection.execute(statement, *values)
                    if statement == "commit":
                        pid = os.fork()
                        if not pid:
                            os._exit(0)
                        os.waitpid(pid, 0)
                    return found

            t.delay()
            link = p.default_app.store.db.link()
            link.connection = Forking(link.connection)
            assert (t.delay().id, link.is_closed) == (2, True)
            assert t.delay().id == 3
        """)
        self.assertEqual(self.sql("select count(*) from bg_task"), [(3,)])

    def test_a_fork_within_a_call_of_sqlite_closes_nothing(self):
        said = self.ran("""
            delay()
            forked = []
            def adapt(value):
                if not forked and value == "t":
                    forked.append(os.fork())
                return value
            sqlite3.register_adapter(str, adapt)
            for act in (lambda: [say("id", r.id) for r in t.delay_many([()] * 3)],
                        delay):
                try:
                    act()
                except p.DatabaseUnavailable as exc:
                    say("refused", forked == [0], "while a transaction" in str(exc)
                        or "forked in the middle" in str(exc))
            if forked == [0]:
                os._exit(0)
            say("child", os.waitpid(forked[0], 0)[1])
        """)
        self.assertEqual(said.count("refused True True"), 2)
        self.assertIn("child 0", said)
        self.assertEqual(len(said), 8)

    @NEEDS_OWN_LOCKS
    def test_a_fork_hook_of_the_apps_may_enqueue(self):
        """One that was registered before ours runs between it and the fork."""
        said = self.ran("""
            os.register_at_fork(before=delay, after_in_parent=delay, after_in_child=delay)
            delay()
            for _ in range(2):
                if os.fork() == 0:
                    [delay() for _ in range(3)]
                    end()
                delay()
                os.wait()
            app.store.close()
            delay()
        """)
        self.assertEqual(len(said), 1 + 2 * (3 + 3 + 1) + 1)

    def test_threads_that_fork_at_once_leave_every_child_able_to_enqueue(self):
        said = self.ran("""
            def fork():
                for _ in range(15):
                    delay()
                    pid = os.fork()
                    if pid == 0:
                        delay()
                        os._exit(0)
                    say("child", os.waitpid(pid, 0)[1])
            threads = [threading.Thread(target=fork) for _ in range(4)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            delay()
            if os.fork() == 0:
                delay()
                os._exit(0)
            os.wait()
            app.store.close()
            open_on = p.descriptors().get(p.file_identity(app.store.path), ())
            say("open", len(open_on) <= 1)
        """)
        self.assertEqual(said.count("child 0"), 60)
        self.assertEqual(said[-1], "open True")

    def test_a_lock_that_is_refused_for_a_moment_is_asked_for_again(self):
        """Another program closes the file now, as its last user."""
        self.store.close()
        other = sqlite3.connect(self.db, isolation_level=None, check_same_thread=False)
        self.addCleanup(other.close)
        other.execute("pragma locking_mode = exclusive").fetchall()
        other.execute("begin immediate")        # from here on nobody else gets in
        identity = pybgworker.file_identity(str(self.db))
        guard = pybgworker.Guard(str(self.db), identity)
        self.addCleanup(guard.close)
        if pybgworker._HAS_OWN_LOCKS:
            self.assertFalse(guard.lock())
            threading.Timer(0.005, other.close).start()
            pybgworker._LOCK_TRIES, old = 2000, pybgworker._LOCK_TRIES
            self.addCleanup(setattr, pybgworker, "_LOCK_TRIES", old)
            self.assertTrue(guard.lock())

    @NEEDS_OWN_LOCKS
    def test_a_connection_of_ones_own_may_be_open_at_the_fork(self):
        said = self.ran("""
            conn = sqlite3.connect(os.environ["PYBGWORKER_DB"], isolation_level=None)
            app.store.create()
            app.store.close()
            say("id", t.options(conn=conn).delay().id)
            gone = Signs()
            if os.fork():
                conn.close()                # the last that SQLite knows of
                gone.give()
                os._exit(0)
            gone.wait()
            [delay(i) for i in range(9)]
            os.close(1)
        """)
        self.assertEqual(len(said), 10)

    @NEEDS_OWN_LOCKS
    def test_a_transaction_of_ones_own_at_the_fork_is_refused_in_the_child(self):
        said = self.ran("""
            conn = sqlite3.connect(os.environ["PYBGWORKER_DB"], isolation_level=None)
            app.store.create()
            conn.execute("begin immediate")
            say("id", t.options(conn=conn).delay().id)
            if os.fork() == 0:
                for connection in (None, sqlite3.connect(app.store.path)):
                    try:
                        t.options(conn=connection).delay()
                    except p.DatabaseUnusable as exc:
                        say("refused", "end it before the fork" in str(exc))
                os._exit(0)
            os.wait()
            conn.execute("commit")
            delay()
        """)
        self.assertEqual(said, ["id 1", "refused True", "refused True", "id 2"])

    def test_a_fork_that_runs_no_hooks_is_noticed_and_refused(self):
        said = self.ran("""
            libc = ctypes.CDLL(None)
            if libc.fork() == 0:            # nothing is open yet
                delay()
                end()
            os.wait()
            delay()
            if libc.fork() == 0:
                for act in (t.delay, lambda: p.AsyncResult(1, app).status):
                    try:
                        act()
                    except p.DatabaseUnusable as exc:
                        say("refused", "fork hooks" in str(exc))
                end()
            os.wait()
            delay()
        """)
        self.assertEqual(said, ["id 1", "id 2", "refused True", "refused True", "id 3"])

    @NEEDS_OWN_LOCKS
    def test_a_connection_inherited_before_our_first_use(self):
        """Nobody has told us of the file, so no hook of ours ran at the fork."""
        self.store.create()
        self.store.close()
        for first in (True, False):
            said = self.ran(f"""
                conn = sqlite3.connect(os.environ["PYBGWORKER_DB"])
                conn.execute("select * from bg_task").fetchall()
                to_child, to_parent = Signs(), Signs()
                if os.fork():
                    if not {first}:
                        to_child.give(); to_parent.wait()
                    conn.close()
                    to_child.give()
                    os.wait()
                    sys.exit()
                to_child.wait()
                try:
                    delay()
                    to_parent.give(); to_child.wait()
                    [delay(i) for i in range(5)]
                except p.DatabaseUnusable as exc:
                    say("refused", "close it before the fork" in str(exc))
                os._exit(0)
            """)
            self.assertEqual(said[-1], "refused True" if first else "id 6")

    def test_a_fork_waits_for_transactions_but_not_for_those_that_wait(self):
        said = self.ran("""
            app.store.create()
            other = sqlite3.connect(os.environ["PYBGWORKER_DB"], isolation_level=None)
            other.execute("begin immediate")
            started = threading.Event()
            take_lock = p.Transaction._take_lock
            def noted(*args):
                started.set()
                return take_lock(*args)
            p.Transaction._take_lock = noted
            thread = threading.Thread(target=delay)
            thread.start()
            started.wait()
            start = time.monotonic()
            if os.fork() == 0:
                os._exit(0)
            say("fork", time.monotonic() - start < 2)
            other.execute("rollback"); other.close()
            thread.join()
        """)
        self.assertEqual(said, ["fork True", "id 1"])

    @unittest.skipUnless(os.path.exists("/proc/locks"), "needs /proc/locks")
    def test_the_child_holds_locks_of_its_own(self):
        said = self.ran("""
            delay()
            if os.fork() == 0:
                delay()
                locks = [line.split() for line in open("/proc/locks")]
                file, shm = (str(os.stat(app.store.path + s).st_ino) for s in ("", "-shm"))
                mine = {(lock[5].split(":")[2], lock[6]) for lock in locks
                        if lock[4] == str(os.getpid())}
                say({(file, "1073741826"), (shm, "128")} <= mine)
                os._exit(0)
            os.wait()
        """)
        self.assertEqual(said[-1], "True")

    USED_BY_ANOTHER = """
        import os, sqlite3
        connection = sqlite3.connect(os.environ["PYBGWORKER_DB"])
        connection.execute("update bg_meta set value = value")
        connection.commit()
        connection.close()
    """

    @NEEDS_OWN_LOCKS
    def test_a_stray_close_of_the_file_loses_nothing(self):
        """It drops SQLite's locks; ours still show others that somebody is there."""
        def read():
            with open(self.db, "rb") as file:
                file.read()

        def copy_all():                         # also closes the -wal and -shm
            shutil.copytree(self.folder, self.folder / "copy", dirs_exist_ok=True)

        def in_a_thread(stray):
            thread = threading.Thread(target=stray)
            thread.start()
            thread.join()

        sent = []
        for stray in (read, copy_all, lambda: in_a_thread(copy_all), os.getpid):
            for _ in range(2):
                sent.append(self.app.send("t").id)
                stray()
                self.python(self.USED_BY_ANOTHER)
                self.assertTrue(os.path.exists(f"{self.db}-wal"))
                sent.append(self.app.send("t").id)
            self.app.store.close()              # in good order, and used again
            self.assertFalse(os.path.exists(f"{self.db}-wal"))
        self.assertEqual(sent, list(range(1, 17)))
        self.assertEqual([row[0] for row in self.sql("select id from bg_task")], sent)
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])

    @NEEDS_OWN_LOCKS
    def test_a_stray_close_loses_nothing_of_a_callers_connection(self):
        """Also where no connection of ours is open, or not any more."""
        self.store.create()
        self.store.close()
        sent = []
        for before in (os.getpid, lambda: self.app.send("t").id, lambda: None):
            mine = sqlite3.connect(self.db)
            with mine:
                sent.append(self.app.send("t", conn=mine).id)
            if before() is not None and before is not os.getpid:
                sent.append(sent[-1] + 1)
            self.app.store.close()
            shutil.copy(self.db, self.folder / "copy")
            self.python(self.USED_BY_ANOTHER)
            with mine:
                sent.append(self.app.send("t", conn=mine).id)
            found = self.python("""
                import os, sqlite3
                connection = sqlite3.connect(os.environ["PYBGWORKER_DB"])
                print([id for id, in connection.execute("select id from bg_task")])
            """)
            self.assertEqual(json.loads(found.stdout), sent)
            mine.close()

    @NEEDS_OWN_LOCKS
    def test_a_callers_connection_whose_files_are_gone_is_refused(self):
        for names, is_new in ((("-wal", "-shm"), False), (("", "-wal", "-shm"), True)):
            self.setUp()
            self.store.create()
            self.store.close()
            mine = sqlite3.connect(self.db)
            self.addCleanup(mine.close)
            with mine:
                self.app.send("t", conn=mine)
            for name in names:
                os.unlink(f"{self.db}{name}")
            if is_new:
                self.python("import pybgworker; pybgworker.App().send('u')")
            with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "roll back, cl"):
                with mine:
                    self.app.send("t", conn=mine)
            mine.close()
            again = sqlite3.connect(self.db)
            with again:
                self.app.send("again", conn=again)
            again.close()
            self.assertIn(("again",), self.sql("select name from bg_task"))

    @NEEDS_OWN_LOCKS
    def test_a_fork_hook_of_the_apps_may_open_a_connection_of_its_own(self):
        """It runs in the child before ours: no close of ours drops its locks."""
        said = self.ran(f"""
            import subprocess
            def reconnect():
                global conn
                conn = sqlite3.connect(os.environ["PYBGWORKER_DB"])
                conn.execute("select count(*) from bg_task").fetchall()
            os.register_at_fork(after_in_child=reconnect)
            delay()
            p.FILES.let_go = lambda: None      # as while another thread opens it
            if os.fork() == 0:
                subprocess.run([sys.executable, "-c", {textwrap.dedent(
                    self.USED_BY_ANOTHER)!r}], check=True)
                with conn:
                    say("id", t.options(conn=conn).delay().id)
                os._exit(0)
            del p.FILES.let_go
            os.wait()
        """)
        self.assertEqual(said, ["id 1", "id 2"])

    def test_a_fork_hook_may_wait_for_a_thread_that_waits_for_the_fork(self):
        """By a lock that is held over forks, as that of logging is."""
        said = self.ran("""
            lock, held = threading.RLock(), threading.Event()
            def before():
                held.set()
                lock.acquire()
            os.register_at_fork(before=before, after_in_parent=lock.release,
                                after_in_child=lock.release)
            p._HOOKS_PATIENCE = 0.3
            def enqueue():
                with lock:
                    locked.set()
                    held.wait()             # our own hook has run before this one
                    delay()
            for act in (enqueue, lambda: t.app.store.close() or enqueue()):
                delay()
                locked = threading.Event()
                held.clear()
                thread = threading.Thread(target=act)
                thread.start()
                locked.wait()
                if os.fork() == 0:
                    for _ in range(30):     # while the thread closes its connection
                        delay()
                    end()
                os.wait()
                thread.join()
                delay()
        """)
        self.assertEqual(len(said), 2 * (3 + 30))

    def test_a_fork_hook_may_wait_for_a_thread_that_reads_on(self):
        """Its connection was in a call of SQLite, so that the fork left it open."""
        said = self.ran("""
            lock, locked, held = threading.Lock(), threading.Event(), threading.Event()
            os.register_at_fork(before=lambda: held.set() or lock.acquire(),
                                after_in_parent=lock.release, after_in_child=lock.release)
            p._HOOKS_PATIENCE = p._FORK_PATIENCE = 0.1
            def pause():
                locked.set()
                held.wait()             # our own hook has run before that one
            def read():
                with lock:
                    db = app.store.db
                    db.link().connection.create_function("pause", 0, pause)
                    db.read("select pause()")
                    say("read", app.store.counts()[0][3])
                app.store.close()
            delay()
            thread = threading.Thread(target=read)
            thread.start()
            locked.wait()
            if os.fork() == 0:
                os._exit(0)
            os.wait()
            thread.join()
            delay()
        """)
        self.assertEqual(said, ["id 1", "read 1", "id 2"])

    def test_a_read_within_a_read_does_not_wait_for_a_fork_that_waits_for_it(self):
        """In a signal handler: so it ends, and with it the outer one."""
        forks, db = pybgworker.FORKS, self.store.db
        with mock.patch.multiple(forks, _forking=[-1], _closing=[-1],
                                 wait=mock.Mock(side_effect=AssertionError)):
            with self.assertRaises(AssertionError):
                db.read("select 1")
            db.link().is_reading = True
            self.assertEqual(db.read("select 1"), [(1,)])
        self.assertTrue(db.link().is_reading)
        db.link().is_reading = False

    def test_a_child_forked_while_a_thread_would_not_wait_is_refused(self):
        said = self.ran("""
            begun, forked = threading.Event(), Signs()
            p._HOOKS_PATIENCE = 0.1
            os.register_at_fork(before=begun.wait)      # runs after ours
            def insert(*args):
                begun.set()
                forked.wait()
                return real(*args)
            real, p.insert_all = p.insert_all, insert
            p.FORKS._watch()
            app.store.create()
            os.register_at_fork(before=lambda: (thread.start(), ready.wait()))
            ready = threading.Event()
            def enqueue():
                ready.set()
                while not p.FORKS.is_on(): pass
                delay()
            thread = threading.Thread(target=enqueue)
            if os.fork() == 0:
                p.insert_all = real
                try:
                    delay()
                except p.DatabaseUnusable as exc:
                    say("refused", "end it before the fork" in str(exc))
                os._exit(0)
            os.wait()
            forked.give()
            thread.join()
            forked.give()
            delay()
        """)
        self.assertEqual(said, ["refused True", "id 1", "id 2"])

    def test_daemon_threads_may_use_a_file_while_the_program_ends(self):
        """It waits for a call that they are in, and they begin no other."""
        for act in ("t.delay()", "app.store.counts()", "result.status"):
            done = self.python(textwrap.dedent(self.PROGRAM) + textwrap.dedent(f"""
                result = t.delay()
                calls = 0
                def use():
                    global calls
                    while True:
                        {act}
                        calls += 1
                [threading.Thread(target=use, daemon=True).start() for _ in range(3)]
                while calls < 20:
                    time.sleep(0.001)
                p.FORKS._close_all = lambda patience, real=p.FORKS._close_all: [
                    real(patience), say("left", any(
                        link.is_busy for link in p.FILES.open_links()))]
            """), check=False)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(done.stdout, "left False\n")
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])

    @NEEDS_OWN_LOCKS
    def test_who_has_the_file_open_alone_may_do_with_it_what_he_likes(self):
        """Also if his connection was open before our first use of it."""
        self.python("import pybgworker; pybgworker.App().send('t')")
        mine = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(mine.close)
        mine.execute("select * from bg_task").fetchall()
        for _ in range(2):
            self.app.send("t")
            self.app.store.close()
            self.assertEqual(mine.execute("pragma journal_mode = delete").fetchall(),
                             [("delete",)])
            self.assertEqual(mine.execute("pragma journal_mode = wal").fetchall(),
                             [("wal",)])
        mine.execute("begin immediate")         # and shut us out meanwhile
        self.app.configure(busy_timeout=0.01)
        self.assertRaises(pybgworker.DatabaseBusy, self.app.send, "t")
        mine.execute("rollback")

    @NEEDS_OWN_LOCKS
    @NEEDS_OLDER_SQLITE
    def test_a_connection_of_ones_own_whose_log_is_gone_is_told_of(self):
        self.python("import pybgworker; pybgworker.App().send('t')")
        mine = sqlite3.connect(self.db)
        self.addCleanup(mine.close)
        mine.execute("select * from bg_task").fetchall()
        shutil.copy(self.db, self.folder / "copy")      # before our first use
        self.python(self.USED_BY_ANOTHER)
        self.addCleanup(pybgworker.FILES.refused.clear)
        for act in (lambda: self.app.send("t"), lambda: self.app.send("t", conn=mine)):
            with self.assertRaisesRegex(pybgworker.DatabaseUnusable, "for a copy"):
                act()

    @NEEDS_OWN_LOCKS
    def test_a_file_that_is_not_open_any_more_keeps_no_descriptor(self):
        names = [str(self.folder / f"{n}.db") for n in range(4)]
        found = self.python("""
            import os, sqlite3, sys, threading, pybgworker as p
            del os.environ["PYBGWORKER_DB"]     # it beats what App() is told
            def count():
                names = [os.path.realpath("/dev/fd/" + fd) for fd in os.listdir("/dev/fd")]
                return sum(".db" in name for name in names)
            for n, name in enumerate(sys.argv[1:]):
                app = p.App(db=name)
                mine = sqlite3.connect(name)
                mine.execute("select * from sqlite_master").fetchall()
                if n == 1:                      # before our first use
                    mine.execute("pragma journal_mode = wal").fetchall()
                app.send("t")
                thread = threading.Thread(target=app.send, args="t")
                thread.start()
                thread.join()
                if n == 2:
                    mine.execute("select * from bg_task").fetchall()
                    if os.fork() == 0:
                        os._exit(0)
                    os.wait()
                mine.close()
                if n == 3:
                    os.unlink(name)
                app.store.close()
                print(count(), sorted(name for name in os.listdir() if "-wal" in name))
        """, *names)
        self.assertEqual(found.stdout, "0 []\n" * 3 + "0 ['3.db-wal']\n")

    def test_what_a_program_leaves_behind_is_one_file(self):
        for end in ("pass", "del app, t", "threading.Thread(target=delay).start()",
                    "if os.fork() == 0: delay(); sys.exit()\nos.wait()"):
            self.setUp()
            self.ran("delay()\n" + end)
            with self.subTest(end):
                self.assertFalse(os.path.exists(f"{self.db}-wal"))

    @NEEDS_OLDER_SQLITE
    def test_a_log_that_was_deleted_takes_no_commit(self):
        """As after a stray close(), where no lock of ours can prevent it."""
        self.addCleanup(setattr, pybgworker, "_HAS_OWN_LOCKS",
                        pybgworker._HAS_OWN_LOCKS)
        pybgworker._HAS_OWN_LOCKS = False
        self.addCleanup(pybgworker.FILES.refused.clear)
        self.app.send("before")
        with open(self.db, "rb"):
            pass
        self.python(self.USED_BY_ANOTHER)
        self.assertFalse(os.path.exists(f"{self.db}-wal"))
        for act in (lambda: self.app.send("after"), lambda: self.store.cancel(1, 1)):
            with self.assertRaisesRegex(pybgworker.DatabaseUnusable, "-wal was deleted"):
                act()
        other = App(db=str(self.db))            # knows nothing of a stale -wal
        self.python("import pybgworker; [pybgworker.App().send('u') for _ in '123']")
        self.app.store.close()                  # and this moves nothing over
        self.assertRaises(pybgworker.DatabaseUnusable, other.send, "after")
        found = self.python("""
            import os, sqlite3
            connection = sqlite3.connect(os.environ["PYBGWORKER_DB"])
            print(connection.execute("select group_concat(name) from bg_task").fetchall(),
                  connection.execute("pragma integrity_check").fetchall())
        """)
        self.assertEqual(found.stdout, "[('before,u,u,u',)] [('ok',)]\n")

    def test_a_log_deleted_by_hand_is_an_error_that_stays(self):
        self.app.send("t")
        self.addCleanup(pybgworker.FILES.refused.clear)
        os.unlink(f"{self.db}-wal")
        for _ in range(2):
            with self.assertRaisesRegex(pybgworker.DatabaseUnusable, "-wal was deleted"):
                self.app.send("t")


# == Schema ===================================================================


class Views(QueueCase):
    """What is for the shell and for other programs."""

    def rows(self, query):
        connection = sqlite3.connect(f"file:{self.db}?mode=ro", uri=True)
        connection.row_factory = sqlite3.Row
        try:
            return [dict(row) for row in connection.execute(query)]
        finally:
            connection.close()

    def prepare(self):
        """A task in each state."""
        self.enqueue("mail.send", at=self.now + 60_000)
        self.enqueue("mail.send", count=6)
        runs = self.claim(names=["mail.send"], free=5)
        error = {"kind": "exception", "type": "KeyError", "message": "'x'", "final": "abort"}
        self.turn(history=pybgworker.RunCounts(), outcomes=[
            Outcome(runs[0], pybgworker.SUCCESS, "1", started_at=self.now, duration=0.25),
            Outcome(runs[1], pybgworker.RETRYING, error=error, run_at=self.now + 9,
                    started_at=self.now, duration=0.25),
            Outcome(runs[2], pybgworker.FAILED, error=error, duration=0.5,
                    started_at=self.now + 1500)])
        self.store.cancel(runs[3].id + 2, self.now)

    def test_v_tasks_has_states_in_words_and_times_in_utc(self):
        self.prepare()
        rows = self.rows("select * from v_tasks order by id")
        self.assertEqual([row["status"] for row in rows], [
            "scheduled", "success", "retrying", "failed", "running", "running", "cancelled"])
        self.assertEqual(rows[3], {
            "id": 4, "status": "failed", "name": "mail.send", "queue": "default",
            "priority": 5, "key": None, "attempt": 1, "retries": 3, "timeout": None,
            "created_at": "2027-01-15T08:00:00.000Z", "run_at": "2027-01-15T08:00:00.000Z",
            "started_at": "2027-01-15T08:00:01.500Z",
            "finished_at": "2027-01-15T08:00:00.000Z", "duration": 0.5, "meta": None})
        self.sql("update bg_task set state = 42 where id = 1")
        self.assertEqual(self.rows("select status from v_tasks where id = 1"),
                         [{"status": 42}])

    def test_v_failures_has_the_error_of_each_failed_task(self):
        self.prepare()
        wanted = {"id": 4, "name": "mail.send", "queue": "default", "attempt": 1,
                  "finished_at": "2027-01-15T08:00:00.000Z", "kind": "exception",
                  "type": "KeyError", "message": "'x'"}
        self.assertEqual(self.rows("select * from v_failures"), [wanted])
        self.sql("update bg_payload set body = 'by hand'")
        self.assertEqual(self.rows("select * from v_failures"),
                         [{**wanted, "kind": None, "type": None, "message": None}])
        plan = self.rows("explain query plan select * from v_failures where name = 'x'")
        self.assertIn("bg_bad", plan[0]["detail"])

    def test_v_history_has_the_runs_that_ended(self):
        self.prepare()
        self.assertEqual(self.rows("select * from v_history"), [{
            "span": 60, "at": "2027-01-15T08:00:00.000Z", "name": "mail.send",
            "queue": "default", "runs": 3, "succeeded": 1, "failed": 1, "retried": 1,
            "cancelled": 0, "exceptions": 2, "crashed": 0, "timeouts": 0, "lost": 0,
            "aborted": 0, "ran_seconds": 1.0, "waited_seconds": 1.5}])

    def test_v_queues_has_what_is_unfinished_or_paused(self):
        self.prepare()
        self.store.pause("empty", self.now)
        self.sql("update bg_queue set paused_by = 'ops', reason = 'SMTP is down'")
        nothing = {"scheduled": 0, "retrying": 0, "queued": 0, "running": 0}
        self.assertEqual(self.rows("select * from v_queues"), [
            {"queue": "default", **nothing, "scheduled": 1, "retrying": 1, "running": 2,
             "paused": 0, "paused_by": None, "reason": None},
            {"queue": "empty", **nothing, "paused": 1, "paused_by": "ops",
             "reason": "SMTP is down"}])
        self.store.pause("default", self.now)
        self.enqueue(count=3)
        self.sql("update bg_task set alone = 1 where id = 8")
        row = self.rows("select * from v_queues where queue = 'default'")[0]
        self.assertEqual((row["queued"], row["paused"]), (3, 1))

    def test_the_queries_of_the_readme_find_something(self):
        self.prepare()
        text = (HERE / "README.md").read_text(encoding="utf-8")
        queries, = re.findall(r"(?ms)^```sql\n(.*?)^```", text)
        for query in queries.strip().splitlines():
            with self.subTest(query):
                self.assertTrue(self.rows(query))
        for name in re.findall(r"create view (v_\w+)", (HERE / "pybgworker.py").read_text()):
            self.assertIn(f"| `{name}` |", text)


# == Database =================================================================


class Databases(Case):

    def test_every_column_has_a_comment_that_sqlite_keeps(self):
        self.store.data_version()
        for name, text in self.sql("select name, sql from sqlite_master "
                                   "where type = 'table' and name like 'bg_%'"):
            for line in text.splitlines()[1:]:
                if re.match(r"    [a-z_]+ +(integer|text|real)", line):
                    with self.subTest(f"{name}: {line.split()[0]}"):
                        self.assertIn("--", line)

    def test_sixteen_processes_open_a_new_file_at_once(self):
        code = """
            import sys, pybgworker as p
            sys.stdin.readline()
            store = p.SqliteStore(sys.argv[1]); app = p.App(db=sys.argv[1])
            print(app.send("t", 1).id)
        """
        programs = [
            subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(self.db)],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.PIPE, env=clean_environment())
            for _ in range(16)
        ]
        for program in programs:
            program.stdin.write("\n")
            program.stdin.flush()
        ended = [program.communicate(timeout=60) for program in programs]

        self.assertEqual([errors for _, errors in ended], [""] * 16)
        self.assertEqual(sorted(int(out) for out, _ in ended), list(range(1, 17)))

    def test_files_that_are_not_ours_are_refused_and_left_alone(self):
        rows = (
            ("a newer one", "create table bg_meta (name, value); "
             "insert into bg_meta values ('schema', 99)", "made by a newer pybgworker"),
            ("another's task", "create table bg_task (x)", "another program's"),
            ("another's meta", "create table bg_meta (x)", "another program's"),
            ("another's rate", "create table bg_rate (x)", "another program's"),
        )
        for name, script, message in rows:
            path = self.folder / name
            connection = sqlite3.connect(path)
            connection.executescript(script)
            connection.close()
            before = path.read_bytes()
            with self.subTest(name):
                with self.assertRaisesRegex(pybgworker.DatabaseUnusable, message):
                    SqliteStore(str(path)).create()
                if name != "another's rate":        # seen only when it is in the way
                    self.assertEqual(path.read_bytes(), before)
                connection = sqlite3.connect(path)
                tables = connection.execute("select count(*) from sqlite_master")
                self.assertEqual(tables.fetchall(), [(1,)])
                connection.close()

    def test_a_database_with_other_tables_can_be_shared(self):
        self.sql("create table mine (id)")
        self.sql("pragma user_version = 7")     # the other program's own
        self.assertEqual(self.app.send("t").id, 1)
        self.sql("pragma user_version = 8")
        self.assertEqual(App(db=str(self.db)).send("t").id, 2)
        self.assertEqual(self.sql("pragma user_version"), [(8,)])

    def further_schema(self, *statements):
        """Let this pybgworker be a newer one, with a further schema."""
        old = pybgworker._MIGRATIONS
        pybgworker._MIGRATIONS = (*old, statements)
        self.addCleanup(setattr, pybgworker, "_MIGRATIONS", old)

    def test_an_older_schema_is_brought_up_to_date_with_its_rows(self):
        self.app.send("t")
        self.store.close()
        self.further_schema("alter table bg_task add column extra",
                            "update bg_task set extra = id")
        self.assertEqual(App(db=str(self.db)).result(1).status, "queued")
        self.assertEqual(self.sql("select extra from bg_task"), [(1,)])
        self.assertEqual(App(db=str(self.db)).send("t").id, 2)
        self.assertEqual(self.sql("select value from bg_meta where name = 'schema'"),
                         [(4,)])
        fresh = App(db=str(self.folder / "fresh.db"))       # both steps at once
        self.addCleanup(fresh.store.close)
        self.assertEqual(fresh.send("t").id, 1)

    def test_an_older_schema_is_brought_up_to_date_by_a_callers_connection(self):
        self.app.send("t")
        self.further_schema("alter table bg_task add column extra")
        mine = sqlite3.connect(self.db)
        self.addCleanup(mine.close)
        self.app.send("t", conn=mine)
        mine.rollback()
        self.assertEqual(self.sql("select value from bg_meta where name = 'schema'"),
                         [(3,)])
        self.app.send("t", conn=mine)
        mine.commit()
        self.assertEqual(self.sql("select id, extra from bg_task"),
                         [(1, None), (2, None)])

    def test_a_store_tells_that_it_has_brought_old_tables_up_to_date(self):
        self.app.send("t")
        self.assertIsNone(SqliteStore(str(self.db)).create())
        self.further_schema("create table bg_extra (n)")
        newer = SqliteStore(str(self.db))
        before, now, seconds = newer.create()
        self.assertEqual((before + 1, now), (now, len(pybgworker._MIGRATIONS)))
        self.assertGreater(seconds, 0)
        self.assertIsNone(SqliteStore(str(self.db)).create())

    def test_a_worker_says_that_it_has_brought_old_tables_up_to_date(self):
        self.app.send("t")
        self.further_schema("create table bg_extra (n)")
        log, self.app = self.folder / "log", App(db=str(self.db))
        worker = self.worker_here(log_to=os.open(log, os.O_CREAT | os.O_WRONLY))
        worker.start()
        worker.stop()
        said, = [event for event in map(json.loads, log.read_text().splitlines())
                 if event["event"] == "database_migrated"]
        self.assertEqual(said["now"], said["before"] + 1)

    def test_a_migration_that_fails_half_way_changes_nothing(self):
        self.app.send("t")
        before = self.sql("select sql from sqlite_master order by name")
        self.further_schema("alter table bg_task add column extra", "nonsense")
        with self.assertRaises(pybgworker.DatabaseUnavailable):
            App(db=str(self.db)).send("t")
        self.assertEqual(self.sql("select sql from sqlite_master order by name"), before)
        self.assertEqual(self.app.send("t").id, 2)

    def test_several_migrate_at_once_and_one_does_it(self):
        self.app.send("t")
        self.further_schema("alter table bg_task add column extra")
        start, ids, problems = threading.Barrier(6), [], []

        def go():
            start.wait()
            try:
                ids.append(App(db=str(self.db)).send("t").id)
            except Exception as exc:
                problems.append(exc)

        threads = [threading.Thread(target=go) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual((sorted(ids), problems), ([2, 3, 4, 5, 6, 7], []))

    def first_schema(self):
        """A file as the first schema has it, with rows of every state; the rows."""
        first = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(first.close)
        for statement in ("pragma journal_mode = wal", *pybgworker._SCHEMA):
            first.execute(statement)
        first.execute("update bg_meta set value = 1 where name = 'schema'")
        first.execute("""insert into bg_worker (id, name, pid, host, boot, port, token,
                            concurrency, started_at, beat_at)
                         values (3, 'w', 1, 'h', 'b', 0, '', 1, 1, 1)""")
        first.executemany("""
            insert into bg_task (id, state, queue, name, priority, place, key, attempt,
                retries, worker, run_at, created_at, args)
            values (?1, ?1 % 7, 'q' || (?1 % 3), 't', ?1 % 5, ?1 % 2, 'k' || ?1, 1, 3, 3,
                iif(?1 % 7 < 2, 4e12, 1), 1, '[[],{}]')""",
                          [(n,) for n in range(1, 141)])
        return self.sql("select * from bg_task"), self.sql("select * from bg_worker")

    def made_of(self, path):
        """The tables and indexes of a file."""
        connection = sqlite3.connect(path)
        self.addCleanup(connection.close)
        return connection.execute("""select name, sql from sqlite_master
            where name like 'bg_%' order by name""").fetchall()

    def test_the_first_schema_is_brought_up_to_date_by_eight_processes_at_once(self):
        tasks, workers = self.first_schema()
        code = """
            import sys, pybgworker
            sys.stdin.readline()
            print(pybgworker.App().send("t", 1).id)
        """
        programs = [
            subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE,
                             env=clean_environment(PYBGWORKER_DB=str(self.db)))
            for _ in range(8)
        ]
        for program in programs:
            program.stdin.write("\n")
            program.stdin.flush()
        ended = [program.communicate(timeout=60) for program in programs]
        self.assertEqual([errors for _, errors in ended], [""] * 8)
        self.assertEqual(sorted(int(out) for out, _ in ended), list(range(141, 149)))

        for table, old in (("bg_task", tasks), ("bg_worker", workers)):
            self.assertEqual([row[:len(old[0])] for row in
                              self.sql("select * from " + table)][:len(old)], old)
        self.assertEqual(self.sql("select distinct alone from bg_task"), [(0,)])
        SqliteStore(str(self.folder / "fresh")).create()
        self.assertEqual(self.made_of(self.db), self.made_of(self.folder / "fresh"))
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])
        # And it works: what was ready is claimed, what ran is reaped.
        self.assertEqual(len(self.store.reap(3, "w", 10)), 20)
        self.assertEqual(self.store.purge(None, None, 10), 60 + 20 + 8)

    def test_a_pybgworker_of_the_first_schema_refuses_what_is_newer(self):
        self.app.send("t")
        with mock.patch.object(pybgworker, "_MIGRATIONS", (pybgworker._SCHEMA,)), \
                self.assertRaisesRegex(pybgworker.DatabaseUnusable,
                                       r"made by a newer pybgworker \(schema 3"):
            App(db=str(self.db)).send("t")

    def test_what_is_wrong_with_the_file_is_said_with_what_to_do(self):
        garbage = self.folder / "garbage"
        garbage.write_bytes(b"not a database at all, not a database at all" * 100)
        for path, kind, words in (
            (garbage, pybgworker.DatabaseUnusable, "it is some other file"),
            (self.folder / "no" / "folder", pybgworker.DatabaseUnavailable, "such a folder"),
            (garbage / "queue.db", pybgworker.DatabaseUnavailable, "such a folder"),
            (self.folder, pybgworker.DatabaseUnavailable, "unable to open"),
        ):
            with self.subTest(path), self.assertRaises(kind) as caught:
                SqliteStore(str(path)).create()
            self.assertIn(words, str(caught.exception))

    def test_a_read_only_database_is_refused_without_loss(self):
        self.app.send("t")
        self.store.close()
        self.store.db._local.link = None
        connection = self.store.db.link().connection
        connection.execute("pragma query_only = on").fetchall()
        with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "readonly"):
            self.app.send("t")
        connection.execute("pragma query_only = off").fetchall()
        self.assertEqual(self.app.send("t").id, 2)

    def test_a_corrupt_database_is_unusable_and_not_replaced(self):
        pybgworker.Task(self.app, print, "t" * 190, {}).delay_many([()] * 10)
        self.store.db.checkpoint()
        self.store.close()
        with open(self.db, "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * 4096 * 3)
        for act in (lambda: self.store.tasks(), lambda: self.app.send("t")):
            self.assertRaises(pybgworker.DatabaseUnusable, act)
        self.assertEqual(self.db.read_bytes()[4096:16384], b"\xff" * 4096 * 3)

    def test_a_locked_database_is_busy_after_the_patience(self):
        self.app.configure(busy_timeout=0.05)
        self.store.data_version()
        other = sqlite3.connect(self.db, isolation_level=None)
        other.execute("begin immediate")
        with self.assertRaisesRegex(pybgworker.DatabaseBusy, "write lock"):
            self.app.send("t")
        other.execute("rollback")
        other.close()
        self.assertEqual(self.app.send("t").id, 1)

    def test_whether_the_log_is_still_there_is_asked_of_the_folder(self):
        """Not of the log: a stat of it makes the next write to it journal its time."""
        wal, aside = Path(f"{self.db}-wal"), self.folder / "aside"

        def replace():
            wal.rename(aside)
            wal.write_bytes(b"")

        def restore():
            aside.replace(wal)

        for age in (0, 3600):
            for act in (lambda: wal.rename(aside), replace):
                with self.subTest(age=age, act=act):
                    wal.touch()
                    files = pybgworker.WalFiles(str(self.db))
                    at = self.folder.stat().st_mtime_ns
                    os.utime(wal, ns=(at + age * 10**9,) * 2)
                    self.assertTrue(files.is_there() and files.is_there())
                    with mock.patch.object(os, "stat", wraps=os.stat) as asked:
                        files.is_there()
                    self.assertEqual(asked.call_count, 1 if age else 2)
                    act()           # by one that puts back the folder's time: tar
                    os.utime(self.folder, ns=(at, at))
                    self.assertFalse(files.is_there())
                    self.assertFalse(files.is_there())
                    restore()
                    self.assertTrue(files.is_there())
        (self.folder / "other").touch()
        self.assertTrue(files.is_there())
        fat = mock.Mock(st_dev=1, st_ino=1, st_mtime_ns=0, st_ctime_ns=0)
        asked, files = os.stat, pybgworker.WalFiles(str(self.db))
        with mock.patch.object(os, "stat", lambda path: (
                fat if path == str(self.folder) else asked(path))):
            self.assertTrue(files.is_there() and files.is_there())
            wal.rename(aside)       # where a folder has no times
            self.assertFalse(files.is_there())
            restore()
        self.folder.rename(f"{self.folder}-away")
        self.assertFalse(files.is_there())
        Path(f"{self.folder}-away").rename(self.folder)

    def test_network_file_systems_are_known_by_their_names(self):
        line = "36 35 98:0 / /home/a\\040b rw - {} none rw\n1 1 0:1 / / rw - ext4 x rw\n"
        for kind in ("nfs4", "fakeowner", "fuse.grpcfuse", "osxfs", "drvfs", "smb2",
                     "fuse.glusterfs", "fuse.sshfs", "9p", "fuse.rclone"):
            with self.subTest(kind), \
                    self.assertRaisesRegex(pybgworker.DatabaseUnusable, re.escape(kind)):
                pybgworker.check_place("/home/a b/q.db", line.format(kind), False)
            pybgworker.check_place("/home/a b/q.db", line.format(kind), True)
            pybgworker.check_place("/home/a bc/q.db", line.format(kind), False)
        for kind in ("ext4", "xfs", "btrfs", "overlay", "tmpfs", "fuseblk", "zfs"):
            pybgworker.check_place("/home/a b/q.db", line.format(kind), False)

    def test_a_network_file_system_is_refused_unless_allowed(self):
        old = pybgworker._mount_of
        pybgworker._mount_of = lambda path, mounts: ("/", "nfs4")
        self.addCleanup(setattr, pybgworker, "_mount_of", old)
        with self.assertRaisesRegex(pybgworker.DatabaseUnusable, "PYBGWORKER_ALLOW_NET"):
            self.app.store.create()
        self.app.configure(allow_network_fs=True)
        self.store.data_version()

    def test_callers_follow_a_file_that_was_replaced(self):
        other = App(db=str(self.folder / "restored.db"))
        other.send("restored")
        other.store.close()
        self.app.send("t")
        os.rename(self.folder / "restored.db", self.db)
        for _ in range(2):
            with self.assertRaisesRegex(pybgworker.DatabaseUnusable, "-wal of the old"):
                self.app.send("t")
        os.unlink(f"{self.db}-wal")
        os.unlink(f"{self.db}-shm")
        self.assertEqual(self.app.send("t").id, 2)
        self.assertEqual(self.sql("select name from bg_task"), [("restored",), ("t",)])

    def test_callers_follow_a_link_that_leads_elsewhere_now(self):
        link = self.folder / "current"
        for name in ("a", "b"):
            (self.folder / name).mkdir()
        link.symlink_to("a")
        app = App(db=str(link / "queue.db"))
        app.send("in a")
        App(db=str(self.folder / "b" / "queue.db")).send("in b")
        link.unlink()
        link.symlink_to("b")
        self.assertEqual(app.send("in b, too").id, 2)
        self.assertEqual(app.store.path, str(self.folder / "b" / "queue.db"))

    def start_a_worker(self, app):
        registry = pybgworker.Registry.of(app, "tasks")
        worker = Worker(registry, app.settings, app.store)
        try:
            worker.start()
        finally:
            worker.senses.close()

    def test_a_lost_database_is_never_made_anew(self):
        inside, away = self.folder / "disk", self.folder / "away"
        inside.mkdir()
        app = App(db=str(inside / "queue.db"))
        self.assertEqual(app.send("t").id, 1)
        os.rename(inside, away)
        inside.mkdir()                          # as an unmounted disk looks
        for one in (app, App(db=str(inside / "queue.db"))):
            for use in (lambda: one.send("t"), lambda: one.result(1).get(timeout=1),
                        lambda: self.start_a_worker(one)):
                with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "gone"):
                    use()
        self.assertEqual(os.listdir(inside), [])
        (inside / "queue.db").touch()           # nor is an empty file filled
        app.store.follow = True                 # unlike a worker, which ends
        with self.assertRaisesRegex(pybgworker.DatabaseUnusable, "no queue in it"):
            app.send("t")
        shutil.rmtree(inside)
        os.rename(away, inside)
        self.assertEqual(app.send("t").id, 2)

    def test_a_lost_database_of_a_callers_connection_is_not_made_anew_either(self):
        for path in (self.db, self.folder / "second.db"):
            mine = sqlite3.connect(path)
            app = App(db=str(path))
            app.send("t", conn=mine)
            mine.rollback()
            if path != self.db:
                self.assertEqual(app.send("t").id, 1)       # makes the tables
            app.store.close()
            mine.close()
            os.rename(path, self.folder / "away")
            with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "gone"):
                app.send("t")
            self.assertFalse(path.exists())

    def test_a_relative_path_in_a_folder_that_is_gone_is_said(self):
        done = self.python("""
            import os, pybgworker as p
            del os.environ["PYBGWORKER_DB"]
            os.mkdir("gone"); os.chdir("gone"); os.rmdir("../gone")
            app = p.App(db="q.db")
            for act in (lambda: app.send("t"), lambda: p.AsyncResult(1, app).status):
                try:
                    act()
                except p.DatabaseUnavailable as exc:
                    print("full path" in str(exc))
        """)
        self.assertEqual(done.stdout, "True\nTrue\n")

    def test_a_database_may_leave_its_place_and_come_back(self):
        """What is committed meanwhile goes with it."""
        disk, away = self.folder / "disk", self.folder / "away"
        disk.mkdir()
        app = App(db=str(disk / "queue.db"))
        app.send("t")
        with app.store.db.write() as link:
            link.connection.execute("update bg_task set name = 'u'")
            os.rename(disk, away)
        for _ in range(2):
            with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "gone"):
                app.send("t")
            os.mkdir(disk)                      # as a mount point shows itself
            with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "gone"):
                app.send("t")
            self.assertEqual(os.listdir(disk), [])
            os.rename(away, disk)
            self.assertEqual(app.send("t").id, _ + 2)
            os.rename(disk, away)
        os.rename(away, disk)
        self.assertEqual([row.name for row in app.store.tasks()], ["t", "t", "u"])
        app.store.close()
        self.assertEqual(os.listdir(disk), ["queue.db"])

    def in_a_mount_namespace(self, code):
        """Run a program that may mount; skip the test where that is not allowed."""
        if not sys.platform.startswith("linux") or subprocess.run(
                ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(self.folder)],
                capture_output=True).returncode:
            self.skipTest("needs a mount namespace")
        preamble = """
            import os, subprocess, sys
            import pybgworker as p
            def run(*command): subprocess.run(command, check=True)
        """
        return subprocess.run(
            ["unshare", "-rm", sys.executable, "-c",
             textwrap.dedent(preamble) + textwrap.dedent(code)], cwd=self.folder,
            env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=60).stdout

    def test_an_unmounted_database_is_never_made_anew(self):
        self.assertEqual(self.in_a_mount_namespace("""
            os.mkdir("disk")
            run("mount", "-t", "tmpfs", "none", "disk")
            app = p.App(db="disk/queue.db")
            print(app.send("t").id)
            run("umount", "--lazy", "disk")
            try: app.send("t")
            except p.DatabaseUnavailable as exc: print("gone" in str(exc))
            print(os.listdir("disk"))
        """), "1\nTrue\n[]\n")

    def test_only_delay_and_run_make_a_database(self):
        result = self.app.result(1)
        for use in (lambda: result.status, lambda: result.get(timeout=0), result.cancel,
                    result.retry, result.forget, self.app.store.tasks,
                    lambda: self.app.store.pause("q", 1)):
            with self.assertRaisesRegex(pybgworker.DatabaseUnavailable,
                                        "there is no database .*--db"):
                use()
        with self.assertRaises(sqlite3.OperationalError):   # gone at the last moment
            pybgworker.connect_to(str(self.db)).execute("select 1")
        self.assertEqual(os.listdir(self.folder), [])

    def test_commands_leave_a_file_that_is_no_queue_as_it_is(self):
        other = self.folder / "other.db"
        connection = sqlite3.connect(other)
        connection.execute("create table t (id)")
        connection.close()
        before = other.read_bytes()
        for path, words in ((other, "there is no queue in it"),
                            (self.folder / "mistyped.db", "there is no database")):
            for command in (["inspect"], ["show", "1"], ["retry", "1"], ["purge"],
                            ["retry", "--failed"], ["cancel", "1"], ["prune"],
                            ["pause", "q"], ["resume", "q"]):
                errors = io.StringIO()
                with self.subTest(command), contextlib.redirect_stderr(errors):
                    status = pybgworker.main([*command, "--db", str(path)])
                    self.assertEqual(status, 1)
                    self.assertIn(words, errors.getvalue())
        pybgworker.configure(db=str(self.db))
        pybgworker.default_app._flags.clear()
        self.assertEqual(other.read_bytes(), before)
        self.assertEqual(os.listdir(self.folder), ["other.db"])

    @contextlib.contextmanager
    def unprivileged(self):
        """For root nothing is read-only: be nobody meanwhile."""
        if os.geteuid():
            yield
            return
        os.chmod(self.folder, 0o777)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    def test_a_file_that_was_read_only_is_written_once_it_can_be(self):
        self.app.send("t")
        files = [f"{self.db}{end}" for end in ("", "-wal", "-shm")]
        for path in files:
            os.chmod(path, 0o444)
        app = App(db=str(self.db))
        with self.unprivileged():
            for _ in range(2):
                with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "writable"):
                    app.send("t")
        for path in files:
            os.chmod(path, 0o666)
        with self.unprivileged():
            self.assertEqual(app.send("t").id, 2)

    def test_a_path_may_have_any_name(self):
        names = ["a?b#c%41&mode=memory", "a b\n'\"", "\u00fc", ":x:", "-x"]
        if sys.platform.startswith("linux"):
            names.append(os.fsdecode(b"\xff"))
        for name in names:
            app = App(db=self.folder / name)
            with self.subTest(ascii(name)):
                self.assertEqual(app.send("t").id, 1)
                self.assertIn(name, os.listdir(self.folder))
                mine = sqlite3.connect(app.store.path)
                self.assertEqual(app.send("t", conn=mine).id, 2)
                mine.close()
            app.store.close()
        for name in (":memory:", "file:queue.db?mode=memory"):
            with self.assertRaisesRegex(pybgworker.SettingError, "path of a file"):
                App(db=name)

    def test_all_names_of_a_file_are_one_database(self):
        (self.folder / "real").mkdir()
        (self.folder / "linked").symlink_to("real")
        (self.folder / "link.db").symlink_to("real/queue.db")
        home = os.getcwd()
        self.addCleanup(os.chdir, home)
        os.chdir(self.folder)
        names = ("real/queue.db", "linked/queue.db", "link.db", "./real/../link.db")
        stores = [App(db=name).store for name in names]
        os.chdir(home)                          # where a name was given counts
        for number, store in enumerate(stores, 1):
            task = NewTask("t", "q", 5, None, 0, None, pybgworker.QUEUED, 1, 1)
            self.assertEqual(store.enqueue(task, ["[[],{}]"]), [number])
            self.assertEqual(store.db.wal_bytes(), stores[0].db.wal_bytes())
            self.assertGreater(store.db.wal_bytes(), 0)
            store.close()
        self.assertEqual({store.path for store in stores},
                         {str(self.folder / "real" / "queue.db")})

    def test_workers_by_two_names_do_not_reap_each_other(self):
        self.app.send("t")
        link = self.folder / "link.db"
        link.symlink_to(self.db)
        code = """
            import sys, pybgworker as p
            app = p.App(db=sys.argv[1])
            live = p.Liveness(app.store, app.settings, p.WakeSocket())
            live.register(p.now_ms())
            print("up", flush=True)
            sys.stdin.read()
        """
        other = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(link)], text=True,
            env=clean_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(other.stdout.close)
        self.assertEqual(other.stdout.readline(), "up\n")
        ear = pybgworker.WakeSocket()
        self.addCleanup(ear.close)
        live = pybgworker.Liveness(self.store, self.app.settings, ear)
        live.register(pybgworker.now_ms())
        live.reap_dead(pybgworker.now_ms())
        self.assertEqual(len(self.store.workers()), 2)
        other.stdin.close()
        other.wait()
        live.reap_dead(pybgworker.now_ms())
        self.assertEqual([row.id for row in self.store.workers()], [live.id])

    def test_a_folder_may_be_mounted_twice_and_a_single_file_not(self):
        self.assertEqual(self.in_a_mount_namespace("""
            os.mkdir("here"), os.mkdir("there")
            first = p.App(db="here/queue.db")
            first.send("t")
            run("mount", "--bind", "here", "there")
            second = p.App(db="there/queue.db")
            print(second.send("t").id, first.send("t").id, second.result(3).status)
            print(first.store.db.wal_bytes() == second.store.db.wal_bytes() > 0)
            open("alone.db", "w").close()
            run("mount", "--bind", "here/queue.db", "alone.db")
            try: p.App(db="alone.db").send("t")
            except p.DatabaseUnusable as exc: print("mount the folder" in str(exc))
        """), "2 3 queued\nTrue\nTrue\n")

    def test_a_second_hard_link_is_refused(self):
        self.app.send("t")
        os.link(self.db, self.folder / "second.db")
        for path in (self.db, self.folder / "second.db"):
            with self.assertRaisesRegex(pybgworker.DatabaseUnusable, "hard link"):
                App(db=str(path)).send("t")
        mine = sqlite3.connect(self.folder / "second.db")
        self.addCleanup(mine.close)
        # An older SQLite cannot even read by a second name.
        with self.assertRaisesRegex(pybgworker.PyBgWorkerError, "queue is|I/O error"):
            self.app.send("t", conn=mine)
        os.unlink(self.folder / "second.db")
        self.assertEqual(App(db=str(self.db)).send("t").id, 2)

    def test_a_new_database_is_private(self):
        """Others get nothing, the group what the umask leaves it."""
        for umask, mode in ((0o022, 0o640), (0o002, 0o660), (0o077, 0o600), (0, 0o660)):
            path = self.folder / f"{umask:o}.db"
            old = os.umask(umask)
            try:
                app = App(db=str(path))
                app.send("t")
            finally:
                os.umask(old)
            for end in ("", "-wal", "-shm"):
                with self.subTest(f"umask {umask:o} {end}"):
                    self.assertEqual(os.stat(f"{path}{end}").st_mode & 0o777, mode)
            app.store.close()

    def test_a_new_database_is_private_also_without_mknod(self):
        old = os.mknod
        self.addCleanup(setattr, os, "mknod", old)

        for error in (errno.EPERM, errno.EINVAL):       # as on macOS
            def refused(*args, error=error):
                raise OSError(error, os.strerror(error))

            os.mknod = refused
            app = App(db=str(self.folder / f"{error}.db"))
            app.send("t")
            self.assertEqual(os.stat(app.store.path).st_mode & 0o007, 0)
            app.store.close()

    @contextlib.contextmanager
    def user(self, uid, gid):
        """Be another user meanwhile, as a service with umask 007."""
        groups, umask = os.getgroups(), os.umask(0o007)
        os.setgroups([])
        os.setegid(gid)
        os.seteuid(uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.setgroups(groups)
            os.umask(umask)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_users_of_a_common_group_share_a_database_and_others_do_not(self):
        """A web server and a worker, each with a user of its own."""
        os.chown(self.folder, 0, 4711)
        os.chmod(self.folder, 0o2770)
        ear = pybgworker.WakeSocket()
        self.addCleanup(ear.close)
        pybgworker.boot_id()                    # all that others may not import
        with self.user(4001, 4711):
            web = App(db=str(self.db))
            self.assertEqual(web.send("t").id, 1)
        with self.user(4002, 4711):
            app = App(db=str(self.db))
            app.store.create()
            worker = pybgworker.Liveness(app.store, app.settings, ear)
            worker.register(1)
            app.store.pause("q", 1)
            app.store.db.checkpoint()
        pybgworker.LiveFile._open.clear()       # as in another process
        with self.user(4001, 4711):
            self.assertEqual(web.send("t").id, 2)
            pybgworker.LiveFile.of(web.store.path + "-live")
        with self.user(4003, 4712):
            stranger = App(db=str(self.db))
            for use in (lambda: stranger.send("t"), stranger.store.tasks,
                        lambda: pybgworker.LiveFile.of(f"{self.db}-live")):
                self.assertRaises(pybgworker.DatabaseUnavailable, use)
        for end in ("", "-wal", "-shm", "-live"):
            found = os.stat(f"{self.db}{end}")
            self.assertEqual((found.st_gid, found.st_mode & 0o777), (4711, 0o660), end)
        app.store.close()
        web.store.close()

    def test_another_program_cannot_end_the_wal_mode_while_we_are_there(self):
        self.app.send("t")
        with self.assertRaisesRegex(sqlite3.OperationalError, "locked"):
            self.sql("pragma journal_mode = delete")
        self.app.store.close()
        self.assertEqual(self.sql("pragma journal_mode = delete"), [("delete",)])
        self.assertEqual(self.app.send("t").id, 2)
        self.assertEqual(self.sql("pragma journal_mode"), [("wal",)])

    def test_other_programs_may_vacuum_checkpoint_and_copy_while_we_are_there(self):
        sent = [self.app.send("t").id]
        for work in ("connection.execute('vacuum')",
                     "print(connection.execute('pragma wal_checkpoint(truncate)')"
                     ".fetchall())",
                     "connection.backup(sqlite3.connect('copy.db'))"):
            done = self.python(f"""
                import os, sqlite3
                connection = sqlite3.connect(os.environ["PYBGWORKER_DB"])
                {work}
                connection.close()
            """)
            self.assertIn(done.stdout, ("", "[(0, 0, 0)]\n"))
            sent.append(self.app.send("t").id)
        self.assertEqual([row[0] for row in self.sql("select id from bg_task")], sent)
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])

    def test_a_backup_may_be_restored_while_we_are_there(self):
        self.app.send("t")
        copy = sqlite3.connect(self.folder / "copy.db")
        live = sqlite3.connect(self.db)
        live.backup(copy)
        later = [self.app.send("t") for _ in range(50)]
        copy.backup(live)                       # what .restore does
        copy.close()
        live.close()
        self.assertRaises(pybgworker.TaskNotFound, lambda: later[0].status)
        self.assertEqual(self.app.send("u").id, 2)
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])

    def test_the_mode_of_a_database_that_exists_is_left_alone(self):
        self.sql("create table mine (id)")
        os.chmod(self.db, 0o604)
        self.app.send("t")
        self.assertEqual(os.stat(self.db).st_mode & 0o777, 0o604)

    def test_threads_have_connections_of_their_own(self):
        threads = [threading.Thread(target=lambda: [self.app.send("t") for _ in range(20)])
                   for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.sql("select count(*), max(id) from bg_task"), [(160, 160)])

    def test_a_checkpoint_lets_the_log_start_anew(self):
        task = pybgworker.Task(self.app, print, "t", {})
        sizes = []
        for _ in range(6):
            task.delay_many([("x" * 500,)] * 1000)
            self.store.db.checkpoint_if_large(1 << 19)
            sizes.append(self.store.db.wal_bytes())
        self.assertLess(max(sizes), 3 << 20)
        self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])

    def test_the_database_is_closed_by_sqlite_only(self):
        """What is opened for our own locks is opened once, and stays open."""
        code = """
            import os, sys
            opened = []
            def watch(event, args):
                if event == "open" and isinstance(args[0], (str, os.PathLike)):
                    opened.append(os.path.basename(args[0]))
            sys.addaudithook(watch)
            import pybgworker as p
            app = p.App(); task = p.Task(app, print, "t", {})
            task.delay_many([("x" * 5000,)] * 50); app.store.db.checkpoint()
            app.store.cancel(1, 1); app.store.retry(1, 2); app.store.forget(1)
            p.LiveFile.of(app.store.path + "-live").hold(1)
            held = [os.path.basename(os.readlink(f"/dev/fd/{fd}"))
                    for fd in os.listdir("/dev/fd") if os.path.islink(f"/dev/fd/{fd}")]
            for end in ("", "-wal", "-shm"):
                name = "queue.db" + end
                assert opened.count(name) <= min(1, held.count(name) - 1), name
            print("fine")
        """
        self.assertEqual(self.python(code).stdout, "fine\n")


    def test_a_glance_only_reads_and_ends_in_time(self):
        self.app.send("t")
        with self.store.glance(60):
            self.assertEqual(self.store.task(1).status, "queued")
            with self.assertRaises(pybgworker.DatabaseUnavailable):
                self.app.send("t")
        with self.store.glance(0), \
                self.assertRaisesRegex(pybgworker.DatabaseBusy, "takes too long"):
            self.store.db.read("""
                with recursive n (i) as (select 1 union all select i + 1 from n)
                select count(*) from n limit 1""")
        self.assertEqual(self.app.send("t").id, 2)


# == Group commit =============================================================


class Threads(Case):
    """Several threads that enqueue at once share commits."""

    def setUp(self):
        super().setUp()
        self.store.data_version()
        self.blocker = sqlite3.connect(self.db, isolation_level=None,
                                       check_same_thread=False)
        self.addCleanup(self.blocker.close)
        self.commits, commit = [], pybgworker.GroupCommit._commit

        def counted(group, requests):
            self.commits.append(len(requests))
            return commit(group, requests)

        pybgworker.GroupCommit._commit = counted
        self.addCleanup(setattr, pybgworker.GroupCommit, "_commit", commit)

    def at_once(self, calls, hold=0.0):
        """Run each in a thread, all while the write lock is held by another."""
        self.blocker.execute("begin immediate")
        ended = []

        def run(call):
            try:
                ended.append(call())
            except Exception as exc:
                ended.append(exc)
            self.store.close()

        threads = [threading.Thread(target=run, args=(call,)) for call in calls]
        threads[0].start()
        until(lambda: self.commits)         # it leads, and waits for the lock
        for thread in threads[1:]:
            thread.start()
        until(lambda: hold or len(self.store._group._requests) == len(calls) - 1)
        time.sleep(hold)
        self.blocker.execute("rollback")
        for thread in threads:
            thread.join(20)
        self.assertEqual(len(ended), len(calls))
        return ended

    def test_eight_threads_take_two_commits(self):
        results = self.at_once([lambda n=n: self.app.send("t", n) for n in range(8)])
        self.assertEqual(sorted(r.id for r in results), list(range(1, 9)))
        self.assertEqual(self.commits, [1, 7])
        for result in results:
            self.assertEqual(result.status, "queued")

    def test_each_gets_its_own_ids_from_a_shared_commit(self):
        task = pybgworker.Task(self.app, print, "t", {})
        found = self.at_once([
            lambda n=n: [(n, r.id) for r in task.delay_many([(n,)] * n)] for n in range(1, 7)])
        for n, task_id in sum(found, []):
            self.assertEqual(self.store.args(task_id), f"[[{n}],{{}}]")
        self.assertEqual(sorted(i for _, i in sum(found, [])), list(range(1, 22)))
        self.assertEqual(self.commits, [1, 5])

    def test_keys_hold_within_one_commit(self):
        results = self.at_once([lambda: self.app.send("first")]
                               + [lambda: self.app.send("t", key="k")] * 5)
        self.assertEqual(sorted(r.id for r in results), [1, 2, 2, 2, 2, 2])

    def test_one_that_cannot_be_inserted_spoils_no_other(self):
        calls = [lambda: self.app.send("t")] * 6
        bad = NewTask("t", "q", 5, "\ud800", 0, None, pybgworker.QUEUED, 1, 1)
        calls[3] = lambda: self.store.enqueue(bad, ["[[],{}]"])     # send() refuses it
        results = self.at_once(calls)
        errors = [r for r in results if isinstance(r, Exception)]
        self.assertEqual([type(e) for e in errors], [UnicodeEncodeError])
        self.assertEqual(self.sql("select count(*) from bg_task"), [(5,)])

    def test_all_give_up_together_on_a_locked_database(self):
        self.app.configure(busy_timeout=0.3)
        start = time.monotonic()
        results = self.at_once([lambda: self.app.send("t")] * 6, hold=1.2)
        self.assertEqual({type(r) for r in results}, {pybgworker.DatabaseBusy})
        self.assertLess(time.monotonic() - start, 1.8)
        self.assertEqual(self.sql("select count(*) from bg_task"), [(0,)])
        self.assertEqual(self.app.send("t").id, 1)

    def test_nobody_waits_longer_for_a_lock_than_since_it_came(self):
        """Also who came while another waited already, and leads after that."""
        self.app.configure(busy_timeout=0.6)
        waits = []

        def call(late):
            time.sleep(late)
            start = time.monotonic()
            try:
                return self.app.send("t")
            except pybgworker.DatabaseBusy:
                waits.append(time.monotonic() - start)
                raise

        results = self.at_once(
            [lambda n=n: call(0.2 * n) for n in (0, 0, 1, 1, 2)], hold=1.5)
        self.assertEqual({type(r) for r in results}, {pybgworker.DatabaseBusy})
        self.assertGreater(min(waits), 0.55)
        self.assertLess(max(waits), 1.0)
        self.assertEqual(self.sql("select count(*) from bg_task"), [(0,)])

    def test_a_leader_that_gives_up_leaves_the_others_their_time(self):
        """It fails alone; the lock opens in time for those who came later."""
        group = self.group()
        self.blocker.execute("begin immediate")
        own, other = self.request(), self.request()
        own.deadline = time.monotonic() + 0.1
        group._requests.append(other)
        self.assertRaises(pybgworker.DatabaseBusy, group.submit, own)
        self.assertFalse(other.is_settled)
        self.assertEqual(list(group._requests), [other])
        self.assertTrue(other.bell.acquire(timeout=0))      # it was called to lead
        self.blocker.execute("rollback")
        self.assertEqual(group.submit(other), [1])

    def test_who_leads_calls_all_whose_request_it_committed_and_who_leads_next(self):
        """Or they look by themselves, a tenth of a second later."""
        group = self.group()
        own, other, late = self.request(), self.request(), self.request()
        group._requests.append(other)
        insert = self.store._enqueue_all

        def insert_slowly(*args):
            group._requests.append(late)
            insert(*args)

        with mock.patch.object(self.store, "_enqueue_all", insert_slowly):
            self.assertEqual(group.submit(own), [1])
        self.assertTrue(other.is_done and other.bell.acquire(timeout=0))
        self.assertFalse(late.is_settled)
        self.assertTrue(late.bell.acquire(timeout=0))

    def test_a_thread_in_a_transaction_of_its_own_fails_no_other(self):
        group = self.group()
        own, other = self.request(), self.request()
        group._requests.append(other)
        with self.store.db.write():
            self.assertRaises(pybgworker.DatabaseBusy, group.submit, own)
        self.assertFalse(other.is_settled)
        self.assertEqual(list(group._requests), [other])
        self.assertEqual(group.submit(other), [1])

    def group(self):
        """Looks _enqueue_all() up at each commit, for tests that put another in its place."""
        return pybgworker.GroupCommit(lambda *a: self.store._enqueue_all(*a), self.store.path)

    def request(self):
        task = NewTask("t", "q", 5, None, 3, None, 2, self.now, self.now)
        return pybgworker.Request(task, ["[[],{}]"], time.monotonic() + 20)

    def interrupted(self, where, name):
        """What is left of a leader and of a follower after Ctrl-C in `name`."""
        group, own, other = self.group(), self.request(), self.request()
        group._requests.append(other)
        old = getattr(where, name)

        def interrupt(*args):
            old(*args)
            raise KeyboardInterrupt

        setattr(where, name, interrupt)
        self.addCleanup(setattr, where, name, old)
        with self.assertRaises(KeyboardInterrupt):
            group.submit(own)
        setattr(where, name, old)
        return group, own, other

    def test_an_interrupt_before_the_commit_leaves_the_others_to_themselves(self):
        group, own, other = self.interrupted(pybgworker, "insert_all")
        self.assertEqual(self.sql("select count(*) from bg_task"), [(0,)])
        self.assertFalse(own.is_done or other.is_done or group._requests)
        self.assertEqual(group.submit(other), [1])

    def test_an_interrupt_after_the_commit_enqueues_nothing_twice(self):
        group, own, other = self.interrupted(pybgworker, "send_wake_ups")
        self.assertEqual(self.sql("select count(*) from bg_task"), [(2,)])
        self.assertTrue(own.is_done and other.is_done)
        self.assertEqual(group.submit(other), [2])
        self.assertEqual(self.sql("select count(*) from bg_task"), [(2,)])

    def test_an_interrupted_wait_is_not_enqueued_later(self):
        group, own = self.group(), self.request()
        with group._leading:                        # somebody else leads
            own.bell = type("Bell", (), {"acquire": self.interrupt})()
            self.assertRaises(KeyboardInterrupt, group.submit, own)
        self.assertEqual(list(group._requests), [])

    def interrupt(self, timeout=None):
        raise KeyboardInterrupt

    def interrupted_follower(self, wait, patience=20.0):
        """One whose request a leader has, when Ctrl-C comes after wait(); the leader's.
        """
        group, own, other = self.group(), self.request(), self.request()
        own.deadline = time.monotonic() + patience
        leading = threading.Event()

        def lead():
            with group._leading:
                leading.set()
                until(lambda: group._requests)
                with contextlib.suppress(pybgworker.DatabaseBusy):
                    group._lead(own)
            self.store.close()

        class Bell:
            def acquire(self, timeout):
                if not other.is_given_up:
                    wait(group)
                    raise KeyboardInterrupt
                time.sleep(0.001)

            def release(self):
                pass

        other.bell = Bell()
        thread = threading.Thread(target=lead)
        thread.start()
        self.addCleanup(thread.join)
        leading.wait()
        self.assertRaises(KeyboardInterrupt, group.submit, other)
        return group, own, other, thread

    def test_an_interrupted_wait_is_not_enqueued_by_who_has_the_request(self):
        self.blocker.execute("begin immediate")
        _, own, other, leader = self.interrupted_follower(
            lambda group: until(lambda: not group._requests))
        self.blocker.execute("rollback")
        leader.join()
        self.assertEqual((own.is_done, other.is_done), (True, False))
        self.assertEqual(self.sql("select count(*) from bg_task"), [(1,)])

    def test_an_interrupted_wait_leaves_no_request_for_another_leader(self):
        self.blocker.execute("begin immediate")
        group, own, other, leader = self.interrupted_follower(
            lambda group: until(lambda: not group._requests), patience=0.2)
        leader.join()
        self.assertIsInstance(own.error, pybgworker.DatabaseBusy)
        self.assertEqual(list(group._requests), [])

    def test_an_interrupt_is_raised_when_it_is_known_what_was_committed(self):
        inserted, insert_all = threading.Event(), pybgworker.insert_all

        def insert(link, requests):
            insert_all(link, requests)
            inserted.set()
            until(lambda: requests[-1].is_given_up)

        with mock.patch.object(pybgworker, "insert_all", insert):
            _, own, other, _ = self.interrupted_follower(lambda group: inserted.wait())
            self.assertTrue(own.is_done and other.is_done)
        self.assertEqual(self.sql("select count(*) from bg_task"), [(2,)])

    def test_a_signal_handler_in_the_middle_of_a_delay_is_refused(self):
        inner, next_id = [], pybgworker._next_id

        def handler(connection):
            pybgworker._next_id = next_id
            for act in (lambda: self.app.send("t"), lambda: self.store.cancel(1, self.now)):
                try:
                    inner.append(act())
                except pybgworker.DatabaseBusy as exc:
                    inner.append("signal handler" in str(exc))
            return next_id(connection)

        pybgworker._next_id = handler
        self.addCleanup(setattr, pybgworker, "_next_id", next_id)
        self.assertEqual(self.app.send("t").status, "queued")
        self.assertEqual(inner, [True, True])
        self.assertEqual(self.sql("select count(*) from bg_task"), [(1,)])

    def test_a_delay_without_a_descriptor_left_is_committed_or_raises(self):
        """The checkpoint's second connection fails, and the wake-up's socket."""
        code = """
            import os, resource, sys, pybgworker as p
            p.CALLER_CHECKPOINT_BYTES = 1
            app = p.App(); t = p.Task(app, print, "t", {})
            ids = [t.delay().id]
            os.listdir(".")
            limit = max(map(int, os.listdir("/dev/fd"))) + 1
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            try:
                while True:
                    os.dup(0)
            except OSError:
                pass
            ids += [t.delay().id for _ in range(300)]
            try:
                app.store.db.checkpoint()
            except p.DatabaseUnavailable:
                print(len(ids), ids[-1])
        """
        self.assertEqual(self.python(code).stdout, "301 301\n")
        self.assertEqual(self.sql("select count(*) from bg_task"), [(301,)])

    def test_whatever_a_worker_says_of_its_port_a_delay_is_committed(self):
        self.store.create()
        for n, (port, token) in enumerate(
                ((1 << 40, "x"), (70000, "\ud800"), (9, b"x"), (9, ""))):
            self.sql("insert into bg_worker (name, pid, host, boot, port, token, queues,"
                     " concurrency, started_at, beat_at) values "
                     "('w', 1, 'h', '', ?, cast(? as blob), null, 1, 1, 1)", port,
                     token.encode("utf-8", "surrogatepass") if isinstance(token, str)
                     else token)
            self.assertEqual(self.app.send("t").id, n + 1)

    def log_limit(self, limit):
        """Callers do something about a log of more bytes, which is cut to this."""
        limits = mock.patch.multiple(
            pybgworker, CALLER_CHECKPOINT_BYTES=limit, _WAL_KEEP_BYTES=limit)
        limits.start()
        self.addCleanup(limits.stop)
        self.app.store.close()          # it is told when it opens

    def test_a_checkpoint_that_fails_does_not_fail_the_delay(self):
        def fail(*_):
            raise pybgworker.DatabaseUnavailable("disk I/O error")

        self.store.db.checkpoint_if_large = mock.Mock(side_effect=fail)
        self.log_limit(1)
        self.assertEqual([self.app.send("t").id for _ in range(9)], list(range(1, 10)))
        self.assertTrue(self.store.db.checkpoint_if_large.called)

    def test_callers_keep_the_log_small_whoever_they_are(self):
        """No worker runs; a link of each has one commit, or one has a few large ones."""
        limit = 1 << 20
        self.log_limit(limit)
        self.app.send("t")              # a link that stays

        def in_a_thread(body):
            thread = threading.Thread(target=self.app.send, args=("t", body))
            thread.start()
            thread.join()

        def in_a_new_program(body):
            App(db=str(self.db)).send("t", body)

        for call, size in ((in_a_thread, 100_000), (in_a_new_program, 100_000),
                           (lambda body: self.app.send("t", body), 1_500_000)):
            most = 0
            for _ in range(5_000_000 // size):
                call("x" * size)
                most = max(most, self.store.db.wal_bytes())
            self.assertLess(most, 1.5 * limit + 2 * size)

    @NEEDS_OWN_LOCKS
    @mock.patch.object(pybgworker, "CALLER_CHECKPOINT_BYTES", 200_000)
    def test_callers_overwrite_the_log_from_its_limit_on(self):
        sizes = []
        for _ in range(200):
            self.app.send("t", "x" * 900)
            sizes.append(self.store.db.wal_bytes())
        self.assertGreater(sizes[-1], 200_000)
        self.assertLess(max(sizes), 250_000)
        self.assertEqual(sizes[60], sizes[-1])

    @NEEDS_OWN_LOCKS
    def test_how_much_of_the_log_is_not_in_the_database_yet(self):
        for size in (512, 4096, 65536):
            with self.subTest(page=size):
                path = str(self.folder / f"{size}.db")
                other = sqlite3.connect(path, isolation_level=None)
                other.execute(f"pragma page_size = {size}")
                other.execute("create table theirs (a)")
                app = App(db=path)
                app.send("t")
                other.close()
                db = app.store.db
                found = db.link().guard.log_bytes
                self.assertEqual(found(), db.wal_bytes() - 32)      # less its head
                db.checkpoint()
                self.assertEqual(found(), 0)
                app.send("t")
                self.assertEqual(found() % (size + 24), 0)
                self.assertTrue(0 < found() < db.wal_bytes() // 2)
                app.store.close()

    def test_where_nobody_says_what_is_in_the_log_callers_go_by_its_size(self):
        with mock.patch.object(pybgworker.Guard, "log_bytes", return_value=None):
            self.log_limit(200_000)
            for _ in range(200):
                self.app.send("t", "x" * 900)
            self.assertLess(self.store.db.wal_bytes(), 400_000)

    def test_a_log_that_a_reader_holds_costs_no_checkpoint_for_each_commit(self):
        self.log_limit(400_000)
        self.app.send("t")
        reader = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(reader.close)
        reader.execute("begin")
        reader.execute("select * from bg_task").fetchall()
        tries, real = [], self.store.db.checkpoint
        self.store.db.checkpoint = lambda: tries.append(1) or real()
        for _ in range(60):
            self.app.send("t", "x" * 5000)
        self.assertLess(len(tries), 20)
        self.assertGreater(self.store.db.wal_bytes(), 1_000_000)
        reader.execute("rollback")
        for _ in range(12):
            self.app.send("t", "x" * 5000)
        self.assertLess(self.store.db.wal_bytes(), 900_000)

    def test_a_transaction_left_open_by_an_interrupt_is_undone_by_the_next(self):
        link = self.store.db.link()
        link.connection.execute("begin immediate")
        link.connection.execute("update bg_meta set value = 77")
        self.assertEqual(self.app.send("t").id, 1)
        self.assertEqual(self.sql("select id from bg_task"), [(1,)])


# == Queue ====================================================================


class Enqueueing(QueueCase):

    def test_many_calls_get_ids_in_their_order(self):
        task = pybgworker.Task(self.app, print, "t", {})
        results = task.delay_many([(1,), {"a": 2}, ("x" * 5000,)])
        self.assertEqual([r.id for r in results], [1, 2, 3])
        self.assertEqual([pybgworker.decode(self.store.args(n)) for n in (1, 2, 3)],
                         [[[1], {}], [[], {"a": 2}], [["x" * 5000], {}]])

    def test_large_arguments_stay_off_the_hot_row(self):
        self.enqueue(args='[["' + "x" * 5000 + '"],{}]')
        self.assertEqual(self.sql("select args from bg_task"), [(None,)])
        self.assertEqual(self.sql("select count(*) from bg_payload"), [(1,)])

    def test_a_key_is_free_again_when_its_task_is_finished(self):
        first = self.enqueue(key="k")
        self.assertEqual(self.enqueue(key="k"), first)
        run, = self.claim()
        self.assertEqual(self.enqueue(key="k"), first)
        self.finish(run)
        self.assertNotEqual(self.enqueue(key="k"), first)

    def test_a_key_holds_between_processes(self):
        code = "import pybgworker as p; print(p.App().send('t', key='k').id)"
        self.assertEqual({self.python(code).stdout for _ in range(3)}, {"1\n"})

    def test_an_id_is_never_used_twice(self):
        for _ in range(3):
            last = self.enqueue()
        self.store.forget(last)
        self.assertEqual(self.enqueue(), last + 1)
        run = self.claim()[-1]
        self.finish(run)
        self.store.prune(0, self.now + 1, None, 100)
        self.assertEqual(self.enqueue(), last + 2)

    def test_the_first_task_ever_may_come_in_a_callers_open_transaction(self):
        mine = sqlite3.connect(self.db)
        mine.row_factory = sqlite3.Row
        mine.execute("create table orders (id)")
        mine.execute("insert into orders values (1)")
        result = self.app.send("t", conn=mine)
        self.assertTrue(mine.in_transaction)
        mine.commit()
        mine.close()
        self.assertEqual(result.status, "queued")

    def test_a_callers_connection_may_be_of_any_mode(self):
        self.store.data_version()
        for level, inside in ((None, False), ("", True), ("IMMEDIATE", True)):
            mine = sqlite3.connect(self.db, isolation_level=level)
            result = self.app.send("t", conn=mine)
            with self.subTest(level):
                self.assertEqual(mine.in_transaction, inside)
                if inside:
                    self.assertRaises(pybgworker.TaskNotFound, result.ready)
                    mine.commit()
                self.assertEqual(result.status, "queued")
            mine.close()

    def connect(self, path=None, **options):
        mine = sqlite3.connect(path or self.db, **options)
        self.addCleanup(mine.close)
        return mine

    def test_a_rolled_back_handle_never_names_somebody_elses_task(self):
        self.store.create()
        mine = self.connect()
        lost = self.app.send("t", conn=mine)
        copies = [lost, copy.copy(lost)]
        mine.rollback()
        other = self.app.send("other")
        self.assertEqual(other.id, lost.id)
        for handle in copies:
            for use in (lambda: handle.status, lambda: handle.result,
                        lambda: handle.error, lambda: handle.progress,
                        lambda: handle.attempt, handle.ready, handle.get, handle.cancel,
                        handle.retry, handle.forget):
                self.assertRaises(pybgworker.TaskNotFound, use)
        self.assertEqual(other.status, "queued")

    def test_a_handle_of_a_savepoint_rolled_back_is_no_other_task_of_the_same(self):
        mine = self.connect(isolation_level=None)
        mine.execute("begin")
        mine.execute("savepoint s")
        lost = pybgworker.Task(self.app, print, "t", {}).options(conn=mine).delay_many(
            [(1,), (2,)])
        mine.execute("rollback to s")
        kept = [self.app.send("u", conn=mine, key=key) for key in ("k", "k", None)]
        mine.execute("commit")
        self.assertEqual([handle.id for handle in lost + kept], [1, 2, 1, 1, 2])
        for handle in lost:
            self.assertRaises(pybgworker.TaskNotFound, handle.cancel)
        self.assertEqual({handle.status for handle in kept}, {"queued"})

    def test_the_handle_of_a_keys_holder_follows_the_holders_commit(self):
        committed = self.app.send("t", key="a")
        mine = self.connect()
        first, second = (self.app.send("t", key="b", conn=mine) for _ in range(2))
        held = self.app.send("t", key="a", conn=mine)
        mine.rollback()
        self.assertEqual(self.app.send("other").id, second.id)
        self.assertRaises(pybgworker.TaskNotFound, lambda: first.status)
        self.assertRaises(pybgworker.TaskNotFound, lambda: second.status)
        self.assertEqual((held, held.status), (committed, "queued"))

    def test_a_committed_handle_outlives_a_retry_and_not_the_row(self):
        mine = self.connect()
        looks_late = self.app.send("t", conn=mine)
        mine.commit()
        self.finish(self.claim()[0], pybgworker.FAILED)
        self.app.result(looks_late.id).retry()
        self.assertEqual(looks_late.status, "queued")
        self.app.result(looks_late.id).forget()
        self.assertRaises(pybgworker.TaskNotFound, lambda: looks_late.status)
        self.assertEqual(self.sql("select count(*) from bg_payload"), [(0,)])

    def connect_in_transaction(self, **options):
        """A connection that always is in one which has not begun yet."""
        if sys.version_info >= (3, 12):
            return self.connect(autocommit=False, **options)
        mine = self.connect(isolation_level=None, **options)
        mine.execute("begin")
        return mine

    def test_a_deferred_transaction_is_patient_beside_a_writer(self):
        self.store.create()
        beside, stopping = threading.Event(), threading.Event()

        def write():
            other = sqlite3.connect(self.db, isolation_level=None, timeout=20)
            while not stopping.is_set():
                other.execute("begin immediate")
                other.execute("update bg_meta set value = value")
                beside.set()
                other.execute("commit")
            other.close()

        writer = threading.Thread(target=write)
        writer.start()
        beside.wait()
        try:
            for _ in range(40):
                mine = self.connect_in_transaction(timeout=20)
                self.app.send("t", conn=mine)
                mine.commit()
                mine.close()
        finally:
            stopping.set()
            writer.join()
        self.assertEqual(self.sql("select count(*) from bg_task"), [(40,)])

    def test_a_transaction_that_has_read_too_early_is_told_so(self):
        self.app.send("t")
        mine = self.connect_in_transaction(timeout=0.05)
        mine.execute("select count(*) from bg_task").fetchall()
        self.app.send("t")
        with self.assertRaisesRegex(pybgworker.DatabaseBusy, "begin immediate"):
            self.app.send("t", conn=mine)

    def test_the_first_task_ever_may_come_in_a_transaction_of_any_kind(self):
        for number, connect in enumerate((
            self.connect_in_transaction, self.connect,
            lambda **o: self.connect(isolation_level=None, **o),
        )):
            path = self.folder / f"{number}.db"
            app = App(db=str(path))
            mine = connect(path=path)
            self.addCleanup(app.store.close)
            result = app.send("t", conn=mine)
            mine.commit()
            self.assertEqual(result.status, "queued")

    def test_a_first_task_that_fails_leaves_no_tables(self):
        old = pybgworker._MIGRATIONS
        pybgworker._MIGRATIONS = (old[0][:4] + ("nonsense",),)
        self.addCleanup(setattr, pybgworker, "_MIGRATIONS", old)
        app = App(db=str(self.folder / "fresh.db"))
        for level in (None, ""):
            mine = self.connect(app.settings.db, isolation_level=level)
            with self.assertRaises(pybgworker.DatabaseUnavailable):
                app.send("t", conn=mine)
            self.assertFalse(mine.in_transaction)
            self.assertEqual(mine.execute("select * from sqlite_master").fetchall(), [])

    def test_a_connections_factories_and_converters_do_not_matter(self):
        def as_dict(cursor, row):
            return {column[0]: value for column, value in zip(cursor.description, row)}

        class Cursor(sqlite3.Cursor):
            def execute(self, *args):
                raise AssertionError("the caller's own cursor")

        class Connection(sqlite3.Connection):
            def cursor(self, factory=Cursor):
                return super().cursor(factory)

        sqlite3.register_converter("integer", lambda text: "odd")
        self.addCleanup(sqlite3.converters.pop, "INTEGER")
        for number, (options, attributes) in enumerate((
            ({}, {"text_factory": bytes}),
            ({}, {"text_factory": lambda raw: None}),
            ({}, {"row_factory": sqlite3.Row}), ({}, {"row_factory": as_dict}),
            ({"detect_types": sqlite3.PARSE_DECLTYPES}, {}), ({"factory": Connection}, {}),
        ), 1):
            mine = self.connect(**options)
            for name, value in attributes.items():
                setattr(mine, name, value)
            with self.subTest(number):
                results = [self.app.send("t", conn=mine, key=f"k{number}")
                           for _ in range(2)]
                mine.commit()
                self.assertEqual([(r.id, r.status) for r in results],
                                 [(number, "queued")] * 2)
                for name, value in attributes.items():
                    self.assertIs(getattr(mine, name), value)

    def test_a_connection_that_cannot_be_used_says_why(self):
        self.store.create()
        made = []
        thread = threading.Thread(target=lambda: made.append(sqlite3.connect(self.db)))
        thread.start()
        thread.join()
        closed = self.connect()
        closed.close()
        query_only = self.connect()
        query_only.execute("pragma query_only = on")
        for connection, error, words in (
            (self.connect(f"file:{self.db}?mode=ro", uri=True),
             pybgworker.DatabaseUnavailable, "read-only"),
            (query_only, pybgworker.DatabaseUnavailable, "read-only"),
            (made[0], pybgworker.OptionError, "thread"),
            (closed, pybgworker.OptionError, "closed"),
            ("shop.db", pybgworker.OptionError, "sqlite3.Connection"),
            (self.connect(":memory:"), pybgworker.OptionError, "open on memory"),
        ):
            with self.subTest(words), self.assertRaisesRegex(error, words):
                self.app.send("t", conn=connection)
        self.assertEqual(self.sql("select count(*) from bg_task"), [(0,)])

    def test_an_error_takes_back_what_was_enqueued_and_nothing_else(self):
        self.store.create()
        self.sql("create table orders (id)")
        self.sql("create trigger t before insert on bg_task when new.args like '%bad%' "
                 "begin select raise(abort, 'refused'); end")
        many = pybgworker.Task(self.app, print, "t", {})
        mine = self.connect()
        for before in (True, False):
            if before:
                mine.execute("insert into orders values (1)")
            with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "refused"):
                many.options(conn=mine).delay_many([("good",), ("bad",)])
            self.assertEqual(mine.in_transaction, before)
            mine.commit()
            self.assertEqual(self.sql("select count(*) from orders"), [(1,)])
            self.assertEqual(self.sql("select count(*) from bg_task"), [(0,)])

    def test_a_connection_to_another_file_is_refused(self):
        other = sqlite3.connect(self.folder / "other.db")
        self.addCleanup(other.close)
        with self.assertRaisesRegex(ValueError, "the queue is"):
            self.app.send("t", conn=other)

    def test_the_last_attempt_is_the_one_after_all_retries_that_count(self):
        for before, retries, forgiven, is_last in (
            (0, 0, 0, True), (0, 1, 0, False), (1, 1, 0, True), (2, 3, 0, False),
            (1, 1, 1, False), (2, 1, 1, True), (9, 3, 0, True),
        ):
            run = Run(1, "t", "q", before, retries, forgiven, None, 0, None, "", 5)
            with self.subTest(before=before, retries=retries, forgiven=forgiven):
                self.assertEqual(run.is_last, is_last)


# == Claiming =================================================================


class Claiming(QueueCase):

    def test_claim_takes_by_priority_then_by_id_over_names_and_queues(self):
        ids = [self.enqueue(*row) for row in (
            ("t", "a", 5), ("u", "b", 1), ("t", "b", 5), ("u", "a", 5), ("t", "a", 1))]
        order = [1, 4, 0, 2, 3]
        self.assertEqual([run.id for run in self.claim()], [ids[i] for i in order])

    def test_claim_skips_tasks_that_are_not_due(self):
        later = self.enqueue(at=self.now + 1000)
        self.assertEqual(self.claim(), [])
        self.assertEqual(self.claimed.next_at, self.now + 1000)
        self.now += 1000
        self.assertEqual([run.id for run in self.claim()], [later])

    def test_claim_leaves_what_it_may_not_take(self):
        self.enqueue("unknown", priority=0)
        self.enqueue("t", "paused", 0)
        self.enqueue("t", "other", 0)
        mine = self.enqueue("t", "mine")
        self.store.pause("paused", self.now)
        queues = ("mine", "paused")
        self.assertEqual([r.id for r in self.claim(queues=queues)], [mine])

    def test_claim_takes_no_more_than_there_are_places(self):
        self.enqueue(count=10)
        self.assertEqual(len(self.claim(free=2)), 2)
        self.assertEqual(len(self.claim(free=1, ahead=3, ahead_names=("t",))), 4)

    def test_only_short_tasks_with_retries_left_may_wait(self):
        for row in (dict(retries=0), {}, {}):
            self.enqueue(**row)
        self.assertEqual(self.claim(free=0, ahead=5, ahead_names=("t",)), [])
        self.assertEqual(len(self.claim(free=1, ahead=5, ahead_names=("t",))), 3)
        self.enqueue()
        self.assertEqual(self.claim(free=0, ahead=5), [])

    def test_what_needs_a_free_child_is_not_passed_by_those_behind_it(self):
        self.enqueue(count=2)
        last = self.enqueue(retries=0)
        self.enqueue(count=2)
        runs = self.claim(free=1, ahead=9, ahead_names=("t",))
        self.assertEqual(len(runs), 2)
        self.assertEqual(self.claim(free=1, ahead=9, ahead_names=("t",))[0].id, last)

    def test_a_limited_name_delays_no_other_and_says_when(self):
        self.enqueue("t", priority=0, count=50)
        other = self.enqueue("u", priority=9)
        runs = self.claim(t=2)
        self.assertEqual([r.name for r in runs], ["t", "t", "u"])
        self.assertEqual(runs[-1].id, other)
        self.assertEqual(self.claim(t=2), [])
        self.assertEqual(self.claimed.round.limited, {"t": self.now + 500})
        self.assertEqual(self.claimed.next_at, self.now + 500)
        self.now += 500
        self.assertEqual(len(self.claim(t=2)), 1)

    def test_a_limit_over_all_holds_over_all_names(self):
        self.enqueue("t", count=5)
        self.enqueue("u", count=5)
        self.assertEqual(len(self.claim(**{"": 3})), 3)
        self.assertEqual(len(self.claim(**{"": 3})), 0)

    def test_a_raised_limit_is_followed_within_a_second(self):
        self.enqueue("t", count=50)
        self.claim(t=1)
        self.assertEqual(self.claim(t=1), [])
        self.now += 500
        self.assertGreater(len(self.claim(t=100)), 40)

    def test_peek_agrees_with_claim_and_takes_no_lock(self):
        self.enqueue("unknown")
        self.enqueue(at=self.now + 50)
        other = sqlite3.connect(self.db, isolation_level=None)
        other.execute("begin immediate")
        found, seen = self.store.peek(self.order(), self.now)
        self.assertEqual((found, seen.next_at, seen.round.is_over),
                         (False, self.now + 50, True))
        self.assertTrue(self.store.peek(self.order(), self.now + 50)[0])
        other.close()

    def test_only_a_worker_with_a_row_may_claim(self):
        self.enqueue(count=2)
        self.store.reap(1, "w", self.now)
        self.assertEqual(self.claim(worker=1), [])
        self.assertFalse(self.claimed.is_registered)
        self.assertEqual(len(self.claim(worker=2)), 2)

    def test_a_retry_in_no_time_goes_behind_all_others(self):
        """Three tasks that ask for it for ever take turns with each other and others."""
        self.enqueue(count=3)
        starts = []
        for n in range(12):
            if n == 6:
                self.enqueue()
            run, = self.claim(free=1)
            starts.append(run.id)
            self.finish(run, pybgworker.RETRYING, run_at=self.now)
        self.assertEqual(starts, [1, 2, 3] * 2 + [1, 2, 4, 3] + [1, 2])

    def test_retries_queue_in_the_order_of_their_times(self):
        first = self.enqueue(count=4)
        for n, run in enumerate(self.claim()):
            self.finish(run, pybgworker.RETRYING, run_at=self.now + 40 - 10 * n)
        new = self.enqueue()
        self.now += 100
        ids = [run.id for run in self.claim()]
        self.assertEqual(ids, [new] + [first + n for n in (3, 2, 1, 0)])

    def test_what_was_scheduled_keeps_its_place_and_what_is_handed_back_too(self):
        first = self.enqueue(at=self.now + 50)
        rest = self.enqueue(count=2)
        runs = self.claim(free=1)
        self.turn(stopped=runs)
        self.now += 50
        self.assertEqual([run.id for run in self.claim()], [first, rest, rest + 1])

    def test_a_retry_by_hand_goes_behind_what_waits(self):
        self.enqueue()
        run, = self.claim()
        self.finish(run, pybgworker.FAILED, error={"kind": "exception"})
        self.enqueue(count=2)
        self.store.retry(1, self.now)
        self.assertEqual([run.id for run in self.claim()], [2, 3, 1])

    def looks(self, **order):
        """Claim until a round is over and has found nothing; return what each took."""
        taken, found = [], pybgworker.Round()
        while True:
            self.claim(round=found, **order)
            found = self.claimed.round
            taken.append([run.id for run in self.claimed.runs])
            if found.is_over and not taken[-1]:
                return taken
            if taken[-1]:
                found = found.renewed()

    def test_everything_is_found_in_a_round_behind_any_number_of_groups(self):
        self.fill(3000, "'stopped' || i")
        self.sql("insert into bg_queue (name, paused_at) select queue, 0 from bg_task")
        self.fill(3000, "'open' || i", "'unknown' || (i % 7)")
        self.fill(500, "'open' || (i * 5)", "'u'")
        for order in ({"free": 10}, {"free": 300},
                      {"queues": {f"open{n}" for n in range(2501)}}):
            self.sql("update bg_task set state = 2 where state = 3")
            taken = self.looks(**order)
            with self.subTest(str(order)[:20]):
                missing = set(range(6001, 6501)) - set(sum(taken, []))
                self.assertEqual(missing, set())
                self.assertEqual(len(sum(taken, [])), 500)
                self.assertLess(len(taken), 300)

    def test_something_new_behind_the_look_is_found_by_the_next_round(self):
        """Of each kind of places."""
        for order in ({}, {"free": 0, "beside": 9, "beside_names": "t"},
                      {"beside": 9, "beside_names": "t"}):
            self.sql("delete from bg_task")
            self.fill(1000, "'q' || i", "'unknown'")
            self.claim(**order)
            self.assertFalse(self.claimed.round.is_over)
            new = self.enqueue(queue="a", priority=9)
            with self.subTest(**order):
                self.look_on(self.claimed.round.renewed(), **order)
                self.assertEqual([run.id for run in self.claimed.runs], [new])

    def test_rounds_of_two_kinds_come_to_an_end_together(self):
        """However far apart they are; or a worker with nothing to do would look on."""
        self.fill(1000, "'q' || i", "'unknown'")
        for apart in range(1, 5):
            found = pybgworker.Round(beside=pybgworker.Round())
            for look in range(100):
                if look == apart:       # one begins again, and the other goes on
                    found = found._replace(beside=pybgworker.Round(pybgworker.FIRST_GROUP))
                self.claim(round=found, beside=10, beside_names=("u",))
                found = self.claimed.round
                if look > apart and found.is_over:
                    break
            with self.subTest(apart=apart):
                self.assertLess(look, 40)
        new = self.enqueue(name="u", queue="a", priority=9)
        self.claim(round=found.renewed(), beside=10, beside_names=("u",))
        self.assertEqual([run.id for run in self.claimed.runs], [new])

    def test_groups_without_number_take_turns(self):
        """A neighbourhood of groups with much to do does not keep others waiting."""
        self.fill(100, "'stopped'")
        self.store.pause("stopped", self.now)
        self.fill(6000, "'q' || (i % 600)")
        queues, found, seen = sorted(f"q{n}" for n in range(600)), pybgworker.Round(), set()
        for _ in range(12):
            self.claim(free=10, round=found)
            found = self.claimed.round.renewed()
            seen |= {queues.index(run.queue) // 64 for run in self.claimed.runs}
        self.assertEqual(seen, set(range(10)))

    def test_the_order_holds_past_what_cannot_be_taken(self):
        self.fill(300, "'stopped'")
        self.store.pause("stopped", self.now)
        self.fill(300, "'q' || (i % 5)", "iif(i % 2, 't', 'u')")
        self.sql("update bg_task set priority = id % 3")
        expected = self.sql("""select id from bg_task where queue != 'stopped'
                               order by priority, id""")
        for queues in (None, ("q0", "q1", "q2", "q3", "q4")):
            self.sql("update bg_task set state = 2")
            taken = self.looks(free=7, queues=queues)
            self.assertEqual(sum(taken, []), [row[0] for row in expected])

    def look_on(self, found, **order):
        """Claim until something is found or the round is over; return the round."""
        for _ in range(40):
            self.claim(round=found, **order)
            found = self.claimed.round
            if self.claimed.runs or found.is_over:
                return found
        self.fail("it looks on without end")

    def test_a_round_that_waits_for_a_child_or_a_rate_is_not_looked_on_with(self):
        """Or the worker would turn without end.  It goes on from there later."""
        self.fill(1000, "'q' || i")
        self.sql("insert into bg_queue (name, paused_at) "
                 "select queue, 0 from bg_task where id != 990")
        self.sql("update bg_task set retries = 0")
        child = {"free": 0, "ahead": 9, "ahead_names": ("t",)}, {"free": 1}
        for (waits, goes), priority in itertools.product((child, ({"": 1},) * 2), (5, 0)):
            self.sql("update bg_task set state = 2")
            self.sql("update bg_task set priority = ? where id = 990", priority)
            self.sql("insert or replace into bg_rate values ('', ?)", self.now + 1000)
            found = self.look_on(pybgworker.Round(after=("q3", "t")), **waits)
            self.assertEqual((self.claimed.runs, found.halted), ([], True))
            self.now += 1000
            self.look_on(found.renewed(), **goes)
            self.assertEqual([run.queue for run in self.claimed.runs], ["q990"])
            self.now -= 1000

    def test_a_limited_name_is_met_wherever_it_lies(self):
        """Among the first rows, in one group or many, between names with no task."""
        names = ("a", "mail", "u", "z")
        for queue, queues in (("'q'", None), ("'q' || (i % 2)", ("q", "q0", "q1")),
                              ("'q' || i", None)):
            self.sql("delete from bg_task")
            self.sql("delete from bg_rate")
            self.fill(500, queue, "'mail'")
            other = self.enqueue("u", "q0", priority=9)
            for second in range(3):
                with self.subTest(queue=queue, second=second):
                    taken = self.looks(queues=queues, names=names, mail=1)
                    self.assertEqual([other] * (not second),
                                     [i for i in sum(taken, []) if i == other])
                    self.assertEqual(len(sum(taken, [])), 1 + (not second))
                    self.assertEqual(self.claimed.next_at, self.now + 1000)
                self.now += 1000

    def test_a_limited_name_that_opens_behind_the_look_is_found_by_the_next(self):
        """Its time has come, or a start was given back, while the round goes on."""
        for give_back in (False, True):
            self.sql("delete from bg_task")
            self.sql("delete from bg_rate")
            self.fill(1000, "'q' || i", "'unknown'")
            self.fill(50, "'a'")
            spent = self.claim(t=1)
            self.claim(t=1)
            found = self.claimed.round
            self.assertEqual(
                (found.is_over, found.limited), (False, {"t": self.now + 1000}))
            if give_back:
                self.turn(unbegun=spent)
                found = found.renewed()     # as a worker does that hears of it
            else:
                self.now += 1000
            with self.subTest(give_back=give_back):
                self.look_on(found, t=1)
                self.assertEqual([run.name for run in self.claimed.runs], ["t"])

    def test_names_under_a_limit_over_all_wait_for_that(self):
        """Its start was taken by another worker just when it was to open."""
        self.fill(200, "'q' || i", "'t'")
        self.claim(free=1, **{"": 1})
        self.claim(**{"": 1})
        found = self.claimed.round
        self.now += 1000
        self.assertEqual(len(self.claim(worker=2, **{"": 1})), 1)
        self.assertEqual(self.claim(round=found, **{"": 1}), [])
        self.assertEqual(self.claimed.next_at, self.now + 1000)
        self.assertTrue(self.claimed.round.is_over)

    def work_off(self, rng, **order):
        """Take all that can be taken, as a worker does; return the runs.

        When a look says that there is nothing, the clock goes on to when it says
        that there will be; meanwhile others enqueue.
        """
        found, runs = pybgworker.Round(), []
        for _ in range(9000):
            self.now += rng.choice((0, 0, 0, 400))
            self.claim(free=rng.randint(1, 4), round=found, **order)
            found = self.claimed.round
            runs += self.claimed.runs
            is_new = rng.random() < 0.1 and len(runs) < 60
            if is_new:
                self.enqueue(rng.choice("tuvx"), rng.choice("abcde"), rng.choice((1, 5)))
            if self.claimed.runs or is_new:
                found = found.renewed()
            elif found.is_over and self.claimed.next_at is None:
                return runs
            elif found.is_over:
                self.assertGreater(self.claimed.next_at, self.now)
                self.now, found = self.claimed.next_at, found.renewed()
        self.fail("it looks on without end")

    def test_any_mix_of_queues_names_and_limits_is_worked_off(self):
        """With looks so short that many are needed for whatever there is."""
        for seed in range(20):
            rng = random.Random(seed)
            self.sql("delete from bg_task")
            self.sql("delete from bg_rate")
            self.sql("delete from bg_queue")
            self.fill(rng.choice((0, 5, 40)), "'stopped' || (i % 9)", "'x' || (i % 5)")
            for _ in range(rng.randint(1, 50)):
                self.enqueue(rng.choice("tuvwx"), rng.choice("abcde"), rng.choice((1, 5)))
            for queue in rng.choice(((), ("b", "c"), "acd")):
                self.store.pause(queue, self.now)
            rates = {name: rng.choice((0.5, 1, 3)) for name in ("t", "v", "x", "")
                     if rng.random() < 0.5}
            queues, names = rng.choice((None, ("b", "d"), "abcde")), rng.choice(("tv", "tuvw"))
            beside = {"beside_names": rng.choice(("", "t", "vw")), "beside": 2}
            began = self.now
            with mock.patch.multiple(pybgworker, _PASS_ROWS=rng.choice((1, 3)), _LEAPS=2,
                                     _SEEK_STEPS=rng.choice((2, 5))), self.subTest(seed):
                runs = self.work_off(rng, queues=queues, names=names, **beside, **rates)
                left = self.sql("""select name, queue from bg_task where state = 2
                    and queue not in (select name from bg_queue)""")
                self.assertEqual([row for row in left if row[0] in names
                                  and (queues is None or row[1] in queues)], [])
                for limit, rate in rates.items():
                    starts = sum(limit in ("", run.name) for run in runs)
                    passed = (self.now - began) / 1000
                    self.assertLessEqual(starts, max(1, rate) + rate * passed + 0.01)

    def test_a_rate_is_one_over_all_queues(self):
        for queue in "abcd":
            self.enqueue("t", queue, count=2)
        self.assertEqual(len(self.claim(t=1)), 1)
        self.assertEqual(len(self.claim(t=1)), 0)
        self.assertEqual(len(self.claim(t=1, queues=("c",))), 0)
        self.now += 1000
        self.assertEqual(len(self.claim(t=1)), 1)

    def test_a_name_at_its_limit_is_said_by_the_claim_that_spends_the_last(self):
        self.enqueue("t", count=3)
        self.claim(t=2)
        self.assertEqual(self.claimed.round.limited, {"t": self.now + 500})

    def test_a_token_comes_back_from_a_run_that_never_began(self):
        """Handed back, or cancelled before its start; not from one that has begun."""
        rates = {"t": 1 / 3600, "": 10}
        for end in ("handed back", "cancelled", "interrupted", "cancelled as it ran"):
            self.sql("delete from bg_rate")
            self.sql("delete from bg_task")
            self.enqueue("t", count=2)
            run, = self.claim(**rates)
            self.now += 100
            if end == "cancelled":
                self.finish(run, pybgworker.CANCELLED)
            elif end == "cancelled as it ran":
                self.finish(run, pybgworker.CANCELLED, duration=0.5)
            else:
                self.turn(**{"stopped" if end == "interrupted" else "unbegun": [run]})
            with self.subTest(end):
                self.assertEqual(len(self.claim(**rates)),
                                 int(end in ("handed back", "cancelled")))

    def test_whatever_makes_work_runnable_wakes_the_workers(self):
        """Each hint is for those that would look by themselves only later."""
        self.sql("update bg_worker set port = 4711, token = 'x'")
        held, stopped, lost = (self.enqueue() for _ in range(3))
        runs = self.claim()
        failed = self.enqueue()
        other = self.claim(worker=2)[0]
        self.finish(other, pybgworker.FAILED, worker=2, error={"kind": "x"})
        acts = {
            "enqueue": lambda: self.enqueue(),
            "retry": lambda: self.store.retry(failed, self.now),
            "retry --failed": lambda: (
                self.sql("update bg_task set state = 5 where id = ?", failed),
                self.store.act("retry", Filter(), self.now)),
            "pause": lambda: self.store.pause("default", self.now),
            "resume": lambda: self.store.resume("default"),
            "cancel": lambda: self.store.cancel(held, self.now),
            "not begun": lambda: self.turn(unbegun=[runs[0]]),
            "a stop": lambda: self.turn(stopped=[runs[1]]),
            "a death": lambda: self.store.reap(1, "w", self.now),
        }
        for name, act in acts.items():
            with self.subTest(name), mock.patch.object(
                    pybgworker, "send_wake_ups") as hint:
                act()
                addresses = [a for call in hint.call_args_list for a in call[0][0]]
                self.assertIn((4711, "x"), addresses)
        self.assertEqual([self.status(n) for n in (stopped, lost)], ["queued"] * 2)

    def test_a_rate_limited_task_may_wait_in_a_pipe_if_it_is_a_high_rate(self):
        self.enqueue(count=40)
        for rates, taken in (({"t": 19}, 1), ({"t": 20}, 10), ({"t": 30, "": 5}, 1)):
            self.sql("delete from bg_rate")
            self.sql("update bg_task set state = 2")
            with self.subTest(rates):
                runs = self.claim(free=1, ahead=9, ahead_names=("t",), **rates)
                self.assertEqual(len(runs), taken)

    def test_a_last_attempt_may_wait_if_it_is_proven_what_has_begun(self):
        self.enqueue(retries=0, count=5)
        order = {"free": 1, "ahead": 9, "ahead_names": ("t",)}
        self.assertEqual(len(self.claim(**order)), 1)
        self.assertEqual(len(self.claim(**order, proves_begun=True)), 4)

    # -- kinds of places

    def test_a_kind_that_is_full_stops_no_other(self):
        """Wherever its rows lie, among the first or groups behind; whatever is served.
        """
        for size, full, queues in itertools.product(
                (1, 5, 2000), ("tu", "ut"), (None, ("default", "q"))):
            self.sql("delete from bg_task")
            self.fill(size, name=f"'{full[0]}'")
            other = self.enqueue(full[1], "q", priority=9)
            places = {"free": 0, "beside": 4} if full == "tu" else {"free": 4}
            with self.subTest(size=size, full=full, queues=queues):
                taken = self.looks(beside_names="u", queues=queues, **places)
                self.assertEqual(sum(taken, []), [other])
                self.assertTrue(self.claimed.round.is_over)

    def test_both_kinds_are_taken_in_one_claim_in_order(self):
        self.fill(60, name="iif(i % 3, 't', 'u')")
        runs = self.claim(free=2, ahead=3, ahead_names="t", beside=4, beside_names="u")
        names = collections.Counter(run.name for run in runs)
        self.assertEqual((names, [r.id for r in runs]), (
            {"t": 5, "u": 4}, sorted(r.id for r in runs)))
        self.assertEqual([r.id for r in runs if r.name == "u"], [3, 6, 9, 12])

    def test_who_needs_a_child_lets_coroutines_pass_and_none_of_its_kind(self):
        for count in (2, 200):      # among the first rows, and behind them
            self.sql("delete from bg_task")
            self.fill(count, name="'unknown'")
            needy = self.enqueue("t", retries=0)
            self.enqueue("v", count=50)
            first = self.enqueue("u", count=50)
            order = {"names": "tuv", "ahead": 9, "ahead_names": "tv", "beside": 3,
                     "beside_names": "u"}
            with self.subTest(count):
                runs = self.claim(free=0, **order)
                self.assertEqual([run.id for run in runs], [first, first + 1, first + 2])
                self.assertEqual(self.claimed.waits, 5)
                order["beside"], found = 0, self.claimed.round.renewed()
                self.assertEqual(self.claim(free=0, round=found, **order), [])
                self.assertTrue(self.claimed.round.is_over)
                runs = self.claim(free=1, round=found, **order)
                self.assertEqual(runs[0].id, needy)

    def test_each_kind_goes_on_where_its_own_look_has_come_to(self):
        """Coroutines far away in many groups do not wait until threads have looked."""
        self.fill(1000, "'stopped' || i", "iif(i % 2, 't', 'u')")
        self.sql("insert into bg_queue (name, paused_at) select queue, 0 from bg_task")
        self.fill(300, "'thread' || i", "'t'")
        mine = self.enqueue("u", "z", priority=9)
        found, looks = pybgworker.Round(), 0
        while True:
            looks += 1
            self.assertLess(looks, 40)
            self.claim(free=0, beside=1, beside_names="u", round=found)
            found = self.claimed.round
            if self.claimed.runs:
                break
            self.assertFalse(found.is_over)
        self.assertEqual([run.id for run in self.claimed.runs], [mine])
        self.assertEqual(len(sum(self.looks(free=7, beside_names="u"), [])), 300)

    def test_what_is_known_of_limits_is_forgotten_when_one_kind_begins_anew(self):
        """Not when it waits at the beginning: then it would not know for what."""
        new = pybgworker.Round(pybgworker.FIRST_GROUP)
        halted, over = new._replace(halted=True), pybgworker.Round()
        for main, beside, is_kept in (
            (over, over, True), (over, new, False), (new, over, False),
            (halted, over, True), (over, halted, True), (halted, new, False),
        ):
            both = main._replace(limited={"t": 5}).with_beside(beside)
            with self.subTest(main=main, beside=beside):
                self.assertEqual((both.limited, both.opens_at()),
                                 ({"t": 5}, 5) if is_kept else ({}, None))
                self.assertEqual(both.is_over, main.is_over and beside.is_over)

    def test_a_limit_over_all_is_shared_by_the_kinds_in_order(self):
        self.fill(8, name="iif(i % 2, 't', 'u')")
        order = {"beside": 9, "beside_names": "u", "": 2}
        for _ in range(4):
            taken = sum(self.looks(**order), [])
            self.assertEqual(len(taken), 2)
            self.assertEqual({n % 2 for n in taken}, {0, 1})
            self.now += 1000

    # -- a child to itself

    def alone(self, *args, **kwargs):
        """A task whose last run died among others."""
        task_id = self.enqueue(*args, **kwargs)
        self.sql("update bg_task set alone = 1 where id = ?", task_id)
        return task_id

    def test_a_mark_that_no_program_makes_loses_no_task(self):
        self.enqueue(count=2)
        self.sql("update bg_task set alone = id * 7 - 8")       # by hand
        self.assertEqual([run.id for run in self.claim(alone=5)], [1, 2])
        self.turn(unbegun=self.claimed.runs)
        self.assertEqual(self.sql("select alone from bg_task"), [(1,), (1,)])
        self.assertEqual(self.store.purge("default", None, self.now), 2)

    def test_who_needs_a_child_to_itself_delays_nobody_and_gets_one(self):
        first = self.alone()
        other = self.enqueue(count=3)
        self.assertEqual([r.id for r in self.claim(free=1)], [other])
        found, seen = self.store.peek(self.order(free=1, alone=1), self.now)
        self.assertEqual((found, [(r.id, r.alone) for r in seen.runs]), (True, [(first, True)]))
        runs = self.claim(free=3, alone=1)
        self.assertEqual([(r.id, r.alone) for r in runs],
                         [(first, True), (other + 1, False), (other + 2, False)])
        self.assertEqual([self.status(r.id) for r in runs], ["running"] * 3)

    def test_one_that_is_to_be_alone_keeps_its_place_in_the_order(self):
        late, soon = self.alone(priority=7), self.alone(priority=3)
        middle = self.enqueue(count=2)
        runs = self.claim(free=9, alone=9)
        self.assertEqual([r.id for r in runs], [soon, middle, middle + 1, late])

    def test_one_that_is_to_be_alone_is_found_behind_any_number(self):
        """Of what cannot be taken, be it before it or behind it; in groups, too."""
        for priority, queues in itertools.product((0, 9), (None, ("default", "a", "q7"))):
            self.sql("delete from bg_task")
            self.fill(2000, "'q' || i", "'unknown'")
            mine, others = self.alone(priority=priority), self.enqueue("u", "a", count=2)
            with self.subTest(priority=priority, queues=queues):
                taken = self.looks(free=3, alone=1, queues=queues)
                self.assertEqual(sorted(sum(taken, [])), [mine, others, others + 1])

    def test_each_that_begins_may_take_the_last_child_with_nothing_to_do(self):
        self.enqueue(priority=1)
        self.alone()
        self.assertEqual([r.alone for r in self.claim(free=2, alone=1)], [False])
        self.assertEqual([r.alone for r in self.claim(free=2, alone=1)], [True])

    def test_a_coroutine_that_is_to_be_alone_leaves_no_place_in_its_child(self):
        self.alone("u", priority=1)
        self.enqueue("t", count=3)
        order = {"free": 2, "beside": 9, "beside_names": "u", "alone": 2}
        self.assertEqual([r.name for r in self.claim(**order)], ["u", "t"])

    def test_one_that_is_to_be_alone_needs_what_every_run_needs(self):
        self.store.pause("paused", self.now)
        for row, order in (
            (("t", "paused"), {}), (("v",), {}), (("t", "other"), {"queues": ("mine",)}),
            (("t",), {"t": 1}), (("t",), {"most": {"t": 1}}), (("u",), {"free": 9}),
            (("t",), {"free": 0, "beside": 9}),
        ):
            self.sql("delete from bg_task")
            self.sql("insert or replace into bg_rate values ('t', ?)", self.now + 900)
            self.enqueue()
            self.claim()
            self.alone(*row)
            with self.subTest(row, **order):
                self.assertEqual(self.claim(alone=3, beside_names="u", **order), [])
        self.sql("update bg_task set name = 'u'")
        run, = self.claim(free=0, beside=1, alone=1, beside_names="u")
        self.assertTrue(run.alone)

    def test_those_that_are_to_be_alone_are_no_hindrance_however_many(self):
        self.fill(100_000)
        self.sql("update bg_task set alone = 1, priority = 0")
        mine = self.enqueue("u")
        for alone in (0, 1):
            steps = self.steps(lambda n=alone: self.claim(names="u", alone=n, free=1))
            self.assertEqual([run.id for run in self.claimed.runs], [mine])
            self.assertLess(steps, 1000 if not alone else 6000)
            self.sql("update bg_task set state = 2 where id = ?", mine)

    def test_who_has_come_to_an_end_alone_has_neighbours_again(self):
        """Not who has taken its child with it, nor who was not let come to its end."""
        crash = {"kind": "crash"}
        for end, stays in (
            (lambda run: self.turn(unbegun=[run]), True),
            (lambda run: self.turn(stopped=[run]), True),
            (lambda run: self.store.reap(1, "w", self.now), True),
            (lambda run: self.finish(run, 1, run_at=self.now, error=crash), True),
            (lambda run: self.finish(run, 1, run_at=self.now, error={"kind": "x"}), False),
            (lambda run: self.finish(run, 1, run_at=self.now), False),
            (lambda run: self.finish(run, 4, result="1"), False),
            (lambda run: self.finish(run, 5, error={"kind": "x"}), False),
            (lambda run: (self.finish(run, 5, error=crash),
                          self.store.retry(run.id, self.now)), False),
        ):
            self.sql("delete from bg_task")
            add_workers(self.store, 1)
            self.alone()
            run, = self.claim(free=1, alone=1)
            end(run)
            self.assertEqual(self.sql("select alone from bg_task"), [(int(stays),)])

    def test_a_run_that_died_among_others_is_forgiven_and_marked(self):
        self.enqueue(retries=0)
        run, = self.claim()
        run.alone = True                # says who has seen it die
        self.turn(stopped=[run])
        row = self.store.task(1)
        self.assertEqual((row.status, row.attempt, row.forgiven), ("queued", 1, 1))
        self.assertEqual([self.claim(), len(self.claim(alone=1))], [[], 1])

    # -- so many at a time

    def test_no_more_than_so_many_of_a_name_run_at_a_time_over_all_workers(self):
        self.enqueue("t", count=9)
        other = self.enqueue("u", priority=9)
        most = {"most": {"t": 3}}
        self.assertEqual(len(self.claim(free=2, **most)), 2)
        runs = self.claim(worker=2, **most)
        self.assertEqual([r.name for r in runs], ["t", "u"])
        self.assertEqual(runs[-1].id, other)
        self.assertEqual(self.claim(**most), [])
        self.assertEqual((self.claimed.round.limited, self.claimed.next_at,
                          self.claimed.round.is_over), ({"t": math.inf}, None, True))
        self.finish(runs[0], worker=2)
        self.assertEqual(len(self.claim(**most)), 1)
        self.assertEqual(len(self.claim(most={"t": 5})), 2, "who knows of more, takes them")

    def test_whatever_ends_a_run_makes_room_for_the_next_and_says_so(self):
        """To all workers: only they know that somebody waits for it."""
        self.sql("update bg_worker set port = 4711, token = 'x'")
        for state in (pybgworker.SUCCESS, pybgworker.FAILED, pybgworker.CANCELLED,
                      pybgworker.RETRYING):
            self.ends_for_the_next(state, lambda run, state=state: self.finish(
                run, state, run_at=self.now + 10**6, duration=0.5))
        self.ends_for_the_next("unbegun", lambda run: self.turn(unbegun=[run]))
        self.ends_for_the_next("stopped", lambda run: self.turn(stopped=[run]))
        self.ends_for_the_next("many", lambda run: self.turn(outcomes=[
            Outcome(run, pybgworker.SUCCESS), Outcome(run, pybgworker.SUCCESS)]))
        self.ends_for_the_next("cancel", lambda run: (
            self.store.cancel(run.id, self.now), self.turn(unbegun=[run])))
        self.ends_for_the_next("reap", lambda run: self.store.reap(1, "w", self.now))

    def ends_for_the_next(self, how, end):
        self.sql("delete from bg_task")
        self.enqueue(count=2)
        order = {"most": {"t": 1}, "worker": 2}
        run, = self.claim(most={"t": 1})
        self.assertEqual(self.claim(**order), [])
        waits = self.claimed.round
        with self.subTest(how), mock.patch.object(pybgworker, "send_wake_ups") as hint:
            end(run)
            addresses = [a for call in hint.call_args_list for a in call[0][0]]
            self.assertIn((4711, "x"), addresses)
            self.assertEqual(len(self.claim(round=waits.renewed(), **order)), 1)

    def test_the_end_of_a_run_that_nobody_waits_for_wakes_nobody(self):
        self.sql("update bg_worker set port = 4711, token = 'x'")
        self.enqueue()
        run, = self.claim(most={"u": 1}, t=9)
        with mock.patch.object(pybgworker, "send_wake_ups") as hint:
            self.finish(run)
        self.assertEqual([a for call in hint.call_args_list for a in call[0][0]], [])

    def test_a_limit_of_runs_goes_with_all_others(self):
        """Rates, pauses, keys, priorities; in groups and among the first rows."""
        for is_grouped in (False, True):
            self.sql("delete from bg_task")
            self.sql("delete from bg_rate")
            self.fill(200 * is_grouped, "'q' || i", "'unknown'")
            self.enqueue("t", "a", 1, count=5)
            self.enqueue("t", "paused", 0, count=5)
            self.enqueue("u", "a", 9, count=2)
            self.enqueue("t", "b", 0, key="k")
            self.store.pause("paused", self.now)
            names = [r.name + r.queue for r in self.claim(most={"t": 4}, t=3, u=1)]
            self.assertEqual(names, ["tb", "ta", "ta", "ua"])
            self.now += 1000
            taken = sum(self.looks(most={"t": 4}, t=3, u=1), [])
            self.assertEqual(len(taken), 2)
            self.now += 1000

    def test_eight_threads_that_claim_and_finish_never_run_more_than_so_many(self):
        self.enqueue(count=200)
        running, highest, lock = [0], [0], threading.Lock()

        def work(worker):
            store, has = SqliteStore(str(self.db), durability="normal"), []
            while True:
                order = self.order(worker=worker, free=2, most={"t": 3})
                runs = store.turn(
                    pybgworker.Turn(worker, order=order), self.now, 9.0).claimed.runs
                has += runs
                with lock:
                    running[0] += len(runs)
                    highest[0] = max(highest[0], running[0])
                    running[0] -= bool(has and not runs)    # before its commit
                if has and not runs:
                    store.turn(pybgworker.Turn(
                        worker, [Outcome(has.pop(), pybgworker.SUCCESS)]), self.now, 9.0)
                elif not runs and not self.sql("select 1 from bg_task where state < 4"):
                    return store.close()

        threads = [threading.Thread(target=work, args=(1 + n % 2,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(self.sql("select distinct state from bg_task"), [(4,)])
        self.assertEqual(highest, [3])

    def test_a_token_over_all_comes_back_too(self):
        self.enqueue("t", count=40)
        runs = self.claim(**{"": 10})
        self.turn(unbegun=runs[:4])
        self.assertEqual([r.id for r in self.claim(**{"": 10})], [1, 2, 3, 4])

    def test_what_comes_back_never_fills_a_bucket_beyond_its_burst(self):
        self.enqueue("t", count=40)
        runs = self.claim(t=5)
        self.now += 60_000
        self.turn(unbegun=runs)
        self.assertEqual(len(self.claim(t=5)), 5)


# == Attempts =================================================================


class Kept(QueueCase):
    """What is kept of the runs of a task that are over."""

    ERROR = {"kind": "exception", "type": "ValueError", "message": "no such user"}

    def run_once(self, state=pybgworker.RETRYING, worker=1, **values):
        """Run the task once more, to this end."""
        self.sql("update bg_task set state = 2 where state = 1")
        run, = self.claim(worker=worker)
        values = {"run_at": self.now, "duration": 0.5, **values}
        if state not in (pybgworker.SUCCESS, pybgworker.CANCELLED):
            values.setdefault("error", self.ERROR)
        self.assertEqual(self.finish(run, state, worker=worker, **values), [])
        return run

    def of(self, *fields, task_id=1):
        """These fields of its records."""
        found = [tuple(record[field] for field in fields)
                 for record in self.store.attempts(task_id)]
        return found if len(fields) > 1 else [value for value, in found]

    def payloads(self):
        return [kind for kind, in self.sql("select id % 8 from bg_payload order by id")]

    def test_each_run_that_is_over_has_a_record(self):
        self.enqueue()
        run, = self.claim()
        self.assertEqual(self.store.attempts(1), [])
        began = self.now + 1500
        self.finish(run, pybgworker.RETRYING, started_at=began, duration=0.5,
                    run_at=self.now, error={**self.ERROR, "signal": "SIGKILL",
                                            "peak": 9 << 20, "cpu": 0.25})
        self.assertEqual(self.store.attempts(1), [{
            "attempt": 1, "started_at": began, "waited": 1.5, "duration": 0.5,
            "worker": "w", "outcome": "retried", "kind": "exception",
            "type": "ValueError", "error": "no such user", "signal": "SIGKILL",
            "exit_code": None, "peak": 9 << 20, "cpu": 0.25,
        }])
        self.run_once(pybgworker.FAILED)
        self.assertEqual(self.of("attempt", "outcome"), [(1, "retried"), (2, "failed")])

    def test_a_first_run_that_succeeds_is_written_nowhere_but_in_its_row(self):
        self.enqueue(retries=0)
        run = self.run_once(pybgworker.SUCCESS, result="1", output="x")
        self.assertEqual(self.payloads(), [pybgworker.OUTPUT])
        self.assertEqual(self.of("attempt", "outcome", "waited", "duration", "worker"),
                         [(run.attempt, "success", 0.0, 0.5, "w")])
        self.enqueue()
        self.assertEqual(self.store.attempts(2), [])

    def test_a_success_after_a_failure_has_a_record_too(self):
        self.enqueue()
        self.run_once()
        self.run_once(pybgworker.SUCCESS, result="1")
        self.assertEqual(self.of("outcome", "error"),
                         [("retried", "no such user"), ("success", None)])

    def test_a_run_that_never_began_has_none(self):
        self.enqueue()
        self.turn(unbegun=self.claim())
        self.finish(self.claim()[0], pybgworker.CANCELLED)
        self.assertEqual((self.store.attempts(1), self.status(1)), ([], "cancelled"))

    def test_records_and_outputs_stay_when_a_task_is_retried_and_go_with_it(self):
        self.enqueue(retries=0)
        self.run_once(pybgworker.FAILED, output="first")
        self.store.retry(1, self.now)
        self.assertIsNone(self.store.output(1))
        self.assertEqual(self.of("attempt", "outcome"), [(1, "failed")])
        self.assertEqual(self.store.attempt_output(1, 1), "first")
        self.run_once(pybgworker.FAILED, output="second")
        self.store.act("retry", pybgworker.Filter(state=pybgworker.FAILED), self.now)
        self.run_once(pybgworker.SUCCESS, output="third", result="1")
        self.store.retry(1, self.now)       # also of what had succeeded
        self.run_once(pybgworker.SUCCESS, result="1")
        self.assertEqual(self.of("attempt", "outcome"), [
            (1, "failed"), (2, "failed"), (3, "success"), (4, "success")])
        self.assertEqual([self.store.attempt_output(1, n) for n in range(6)],
                         [None, "first", "second", "third", None, None])
        self.store.forget(1)
        self.assertEqual(self.payloads(), [])
        self.assertRaises(pybgworker.TaskNotFound, self.store.attempts, 1)
        self.assertRaises(pybgworker.TaskNotFound, self.store.attempt_output, 1, 1)

    def test_a_first_success_that_is_retried_by_hand_gets_its_record_then(self):
        self.enqueue()
        self.run_once(pybgworker.SUCCESS, result="1", output="x")
        before = self.store.attempts(1)
        self.store.retry(1, self.now)
        self.assertEqual(self.store.attempts(1), before)
        self.assertEqual(self.store.attempt_output(1, 1), "x")

    def test_a_failure_of_an_older_pybgworker_gets_its_record_at_a_retry(self):
        self.enqueue()
        self.run_once(pybgworker.FAILED)
        self.sql("delete from bg_payload where id % 8 = 6")
        self.assertEqual(self.store.attempts(1), [])
        self.store.retry(1, self.now)
        self.assertEqual(self.of("attempt", "outcome", "type"),
                         [(1, "failed", "ValueError")])

    def test_a_cancellation_of_what_waits_adds_no_record(self):
        self.enqueue()
        self.run_once()
        self.store.cancel(1, self.now)
        self.store.retry(1, self.now)
        self.run_once(pybgworker.CANCELLED, error={"kind": "cancelled"})
        self.store.retry(1, self.now)
        self.assertEqual(self.of("attempt", "outcome"), [(1, "retried"), (2, "cancelled")])

    def test_who_is_lost_with_a_worker_or_not_to_blame_says_so(self):
        self.enqueue(retries=1)
        run, = self.claim()
        self.turn(stopped=[run])
        run, = self.claim()
        run.pardoned = pybgworker.LOST_WITH[True, False]
        self.turn(stopped=[run])
        self.claim(worker=2)
        self.store.reap(2, "w2", self.now)
        add_workers(self.store, 2)
        self.claim(worker=2)
        self.store.reap(2, "w2", self.now)
        self.assertEqual(self.of("attempt", "outcome", "kind", "worker", "error"), [
            (1, "forgiven", "lost", "w", "its worker was stopped: it runs again"),
            (2, "forgiven", "lost", "w", pybgworker.LOST_WITH[True, False]),
            (3, "retried", "lost", "w2", "worker w2 died"),
            (4, "failed", "lost", "w2", "worker w2 died")])
        self.assertEqual(self.store.error(1)["final"], "used_up")

    def test_a_cancelled_run_that_its_worker_gives_back_is_cancelled(self):
        self.enqueue()
        run, = self.claim()
        self.store.cancel(1, self.now)
        self.turn(stopped=[run])
        self.assertEqual((self.of("outcome"), self.status(1)), (["cancelled"], "cancelled"))

    def test_who_gives_back_what_is_not_its_own_any_more_deletes_nothing(self):
        self.enqueue()
        run, = self.claim()
        self.sql("update bg_task set worker = 2")
        self.turn(2, progress=[(run, "[7,null]")])
        self.turn(stopped=[run])
        self.assertEqual(self.store.progress(1), [7, None])
        self.assertEqual(self.store.attempts(1), [])

    def test_the_newest_twenty_records_and_five_outputs_are_kept(self):
        self.enqueue(retries=10**6)
        self.sql("update bg_task set attempt = 9970")
        for n in range(9971, 10_001):
            self.run_once(output=f"output of {n}")
        self.assertEqual(self.of("attempt"), [*range(9981, 10_001)])
        kept = [n for n in range(9900, 10_002) if self.store.attempt_output(1, n)]
        self.assertEqual(kept, [*range(9995, 10_001)])      # the last one's own, too
        self.assertEqual(self.store.attempt_output(1, 10_000), "output of 10000")
        self.assertEqual(self.store.attempt_output(1, 9999), "output of 9999")
        size, = self.sql("select max(length(body)) from bg_payload")[0]
        self.assertLess(size, 20 * 300)

    def test_long_errors_and_outputs_are_kept_by_their_ends(self):
        self.enqueue()
        error = {**self.ERROR, "message": "\ud800\0é" + "x" * 10**6}
        self.run_once(error=error, output="a" * 30_000 + "z" * 30_000)
        self.run_once()
        self.assertEqual(self.of("error")[0], error["message"][:300])
        self.assertEqual(
            self.store.attempt_output(1, 1),
            "a" * 8000 + "\n[44,000 characters are not kept]\n" + "z" * 8000)
        size, = self.sql("select max(length(body)) from bg_payload where id % 8 > 4")[0]
        self.assertLess(size, 17_000)

    def test_the_output_of_the_run_before_is_found_while_one_runs(self):
        self.enqueue()
        self.run_once(output="first")
        self.assertEqual(self.store.attempt_output(1, 1), "first")
        self.sql("update bg_task set state = 2")
        self.claim()
        self.assertEqual(self.store.attempt_output(1, 1), "first")
        self.assertIsNone(self.store.attempt_output(1, 2))

    def test_a_hostile_name_of_a_worker_is_a_text(self):
        name = "w\x1b[2J\"}],<b>"
        self.sql("update bg_worker set name = ?", name)
        self.enqueue()
        self.run_once()
        self.assertEqual(self.of("worker"), [name])

    def test_payloads_edited_by_hand_are_survived(self):
        """What is no record is left out, and what a field cannot have."""
        bad = ["", "nonsense", "[", "7", "null", "{}", "[7, null, []]", '[{"attempt": "1"}]',
               '[{"attempt": true}]', '[{"attempt": 1e999}]', "[" * 100_000, b"\xff\xfe"]
        for text in bad:
            with self.subTest(text[:30]):
                self.enqueue()
                task_id, = self.sql("select max(id) from bg_task")[0]
                for kind in (pybgworker.ATTEMPTS, pybgworker.OUTPUTS):
                    self.sql("insert into bg_payload values (?, ?)", task_id * 8 + kind, text)
                self.assertEqual(self.store.attempts(task_id), [])
                self.assertIsNone(self.store.attempt_output(task_id, 1))
                self.run_once(output="1")
                self.run_once(output="2")
                self.assertEqual(self.of("attempt", task_id=task_id), [1, 2])
                self.assertEqual(self.store.attempt_output(task_id, 1), "1")
                self.sql("update bg_task set state = 6")
        self.sql("update bg_payload set body = ? where id % 8 = 6", json.dumps([
            {"attempt": 3, "worker": 7, "started_at": "x", "peak": 10**400, "more": 1,
             "duration": float("nan"), "error": ["x"], "outcome": "success"}]))
        self.sql("update bg_payload set body = ? where id % 8 = 7",
                 '{"x": "y", "-1": "y", "3": 7, "9": "nine"}')
        found, = self.store.attempts(task_id)
        self.assertEqual({k: v for k, v in found.items() if v is not None},
                         {"attempt": 3, "outcome": "success"})
        self.assertEqual([self.store.attempt_output(task_id, n) for n in (-1, 3, 9)],
                         [None, None, "nine"])

    def test_a_run_that_ends_badly_costs_two_statements_more(self):
        """A look and a record; a third keeps what the run before has printed.  A plain
        first success none."""
        self.enqueue(count=3)

        def cost(run, **values):
            found = self.traced(lambda: self.finish(run, **values))
            return len([each for each in found if not each.startswith("pragma")])

        first, second, third = self.claim()
        self.assertEqual(cost(first, result="1"), 3)                # begin, update, commit
        self.assertEqual(cost(second, state=5, error=self.ERROR), 3 + 1 + 2)    # the error
        again = dict(state=1, error=self.ERROR, run_at=0, output="x")
        # Cancellations, what is old, the error, the output.
        self.assertEqual(cost(third, **again), 3 + 4 + 2)
        self.sql("update bg_task set state = 2 where state = 1")
        self.assertEqual(cost(self.claim()[0], **again), 3 + 4 + 3)
        self.sql("update bg_task set state = 2 where state = 1")
        self.assertEqual(cost(self.claim()[0], result="1"), 3 + 1 + 3)


# == Live rows ================================================================


class LiveRows(QueueCase):
    VALUES = {"name": "w", "pid": 7, "host": "h", "boot": "b", "port": 0, "token": "",
              "queues": None, "concurrency": 1, "live": 0, "now": 5}

    def add(self, **values):
        """Register a worker; return its id."""
        return self.store.add_worker({**self.VALUES, **values}, mock.Mock())

    def row(self, worker):
        return next(row for row in self.store.workers() if row.id == worker)

    def child(self, pid, **values):
        return pybgworker.ChildRow(0, pid, 1, 1000, 0.5)._replace(**values)

    def test_a_worker_says_what_it_is_and_knows_when_it_registers(self):
        known = [pybgworker.KnownTask(0, "b", None, ()),
                 pybgworker.KnownTask(0, "a\x1b\"", 2.5, ("x", "*rest"), 3)]
        worker = self.add(rate=3.5, version="9", tasks=known)
        row = self.row(worker)
        self.assertEqual((row.state, row.rate, row.version, row.note),
                         ("starting", 3.5, "9", None))
        self.assertEqual(self.store.known_tasks(), [
            (worker, "a\x1b\"", 2.5, ("x", "*rest"), 3), (worker, "b", None, (), 0)])

    def test_a_heartbeat_says_how_a_worker_and_its_children_do(self):
        worker = self.add()
        vitals = pybgworker.Vitals("ready", "cannot write", 17, 1.5, 2.5,
                                   [self.child(8), self.child(9, running=3)])
        self.assertTrue(self.store.beat(worker, 4, 0, 6, vitals))
        row = self.row(worker)
        self.assertEqual((row.beat_at, row.running), (6, 4))
        self.assertEqual(
            (row.state, row.note, row.memory, row.cpu, row.children_cpu),
            vitals[:5])
        self.assertEqual(self.store.children(), [
            (worker, 8, 1, 1000, 0.5), (worker, 9, 3, 1000, 0.5)])

        self.store.beat(worker, 0, 0, 7, vitals._replace(children=[self.child(9)]))
        self.assertEqual(self.store.children(), [(worker, 9, 1, 1000, 0.5)])

    def test_who_is_not_registered_says_nothing(self):
        vitals = pybgworker.Vitals("ready", children=[self.child(8)])
        self.assertFalse(self.store.beat(77, 0, 0, 6, vitals))
        self.assertEqual(self.sql("select * from bg_child"), [])

    def test_what_a_worker_says_goes_with_it_but_for_its_cpu_time(self):
        def left():
            return [len(self.sql(f"select * from {table} where {column} = {worker}"))
                    for table, column in (("bg_worker", "id"), ("bg_child", "worker"),
                                          ("bg_worker_task", "worker"))]

        for n, leave in enumerate((
            lambda: self.store.remove_worker(worker, 2.0, 1.0),
            lambda: self.store.remove_dead([self.row(worker)]),
            lambda: self.store.reap(worker, "w", self.now),
        )):
            worker = self.add(tasks=[pybgworker.KnownTask(0, "a", None, ())])
            vitals = pybgworker.Vitals("ready", None, 1, 1.5, 2.5, [self.child(8)])
            self.store.beat(worker, 0, 0, 6, vitals)
            self.assertEqual(left(), [1, 1, 1])
            leave()
            self.assertEqual(left(), [0, 0, 0])
            self.assertEqual(self.store.departed_cpu(), (2.0 + 1.5 * n, 2.5 + 2.5 * n))

    def test_a_worker_with_a_task_keeps_what_it_has_said(self):
        worker = self.add(tasks=[pybgworker.KnownTask(0, "a", None, ())])
        self.enqueue()
        self.claim(worker)
        self.store.remove_worker(worker, 2.0, 1.0)
        self.store.remove_dead([self.row(worker)])
        self.assertEqual(len(self.store.known_tasks()), 1)
        self.assertEqual(self.store.departed_cpu(), (0, 0))

    def test_who_has_beaten_since_is_not_removed_as_dead(self):
        worker = self.add()
        old = self.row(worker)
        self.store.beat(worker, 0, 0, 6)
        self.store.remove_dead([old])
        self.row(worker)

    def note(self, *runs, printed=(), gone=(), worker=1):
        """Have it told that these are in hand, and what they have printed."""
        for run in (*runs, *[told.run for told in printed]):
            run.is_noted = True
        self.store.note_runs(worker, [
            pybgworker.RunRow(run.id, worker, run.attempt, 4711, self.now - run.id, None)
            for run in runs], gone, printed, self.now)

    def printed(self, run, *parts, size=None):
        size = size or sum(len(body) for _, body in parts)
        return pybgworker.PrintedRun(run, parts, size)

    def left(self):
        """How many rows there are about runs, and about their output."""
        return [self.sql(f"select count(*) from {t}")[0][0] for t in ("bg_run", "bg_output")]

    def test_what_runs_is_told_the_oldest_first(self):
        self.enqueue(count=3)
        one, two, three = self.claim()
        waits = pybgworker.RunRow(one.id, 1, 1, 4711, None, two.id)
        self.store.note_runs(1, [waits], [], [], self.now)
        self.note(two, three)
        self.assertEqual([(row.task, row.began_at, row.behind) for row in self.store.runs()],
                         [(3, self.now - 3, None), (2, self.now - 2, None), (1, None, 2)])
        self.note(one, gone=[(2, 1)])               # it has begun; that one was taken back
        self.assertEqual([row.task for row in self.store.runs()], [3, 1])

    def test_nothing_is_told_of_what_is_not_the_worker_s_any_more(self):
        self.enqueue(count=2)
        mine, lost = self.claim()
        self.sql("update bg_task set worker = 2 where id = ?", lost.id)
        again = Run(*[getattr(mine, n) for n in ("id", "name", "queue")], 1, 3, 0, None,
                    0, None, "", 5)                 # the attempt after ours
        for run in (lost, again):
            self.note(run, printed=[self.printed(run, (0, "x"))])
        self.assertEqual(self.left(), [0, 0])
        self.note(mine, printed=[self.printed(mine, (0, "x"))])
        self.note(gone=[(mine.id, 1)], worker=2)
        self.assertEqual(self.left(), [1, 1])

    def test_what_was_told_of_a_run_goes_with_its_end_or_its_return(self):
        ends = (
            lambda run: self.finish(run),
            lambda run: self.finish(run, pybgworker.FAILED, error={"kind": "abort"}),
            lambda run: self.finish(run, pybgworker.RETRYING, run_at=self.now + 10),
            lambda run: self.turn(unbegun=[run]), lambda run: self.turn(stopped=[run]),
            lambda run: self.store.reap(1, "w", self.now),
        )
        for n, end in enumerate(ends):
            add_workers(self.store, 1)
            self.enqueue(count=3)
            run, other, plain = self.claim()
            self.note(run, other, printed=[self.printed(run, (0, "x"))])
            self.assertEqual(self.left(), [2, 1], n)
            self.turn(outcomes=[Outcome(other, pybgworker.SUCCESS),
                                Outcome(plain, pybgworker.SUCCESS)])
            self.assertEqual(self.left(), [1, 1], n)
            end(run)
            self.assertEqual(self.left(), [0, 0], n)
            self.sql("update bg_task set state = 6 where state < 4")

    def test_a_run_of_which_nothing_was_told_costs_no_statement(self):
        def statements(note):
            self.enqueue(count=2)
            runs = self.claim()
            if note:
                self.note(*runs)
            outcomes = [Outcome(run, pybgworker.SUCCESS) for run in runs]
            traced = self.traced(lambda: self.turn(outcomes=outcomes))
            return [s for s in traced if "bg_run" in s or "bg_output" in s]

        self.assertEqual(statements(note=False), [])
        self.assertEqual(len(statements(note=True)), 4)

    def test_what_a_run_has_printed_is_read_from_where_one_left_off(self):
        self.enqueue()
        run, = self.claim()
        self.note(printed=[self.printed(run, (0, "a\0\x1b"), (3, "\u20ac"))])
        rows = self.store.live_output(run.id, 1)
        self.assertEqual(rows, [(0, self.now, "a\0\x1b"), (3, self.now, "\u20ac")])
        self.note(printed=[self.printed(run, (4, "more"), size=8)])
        self.assertEqual(self.store.live_output(run.id, 1, rows[-1].seq),
                         [(4, self.now, "more")])
        self.assertEqual(self.store.live_output(run.id, 2), [])
        self.assertEqual(self.store.live_output(77, 1), [])
        self.assertRaises(pybgworker.TaskNotFound, self.store.live_output, 0, 1)

    def test_what_lies_between_the_beginning_and_the_end_of_an_output_goes(self):
        self.enqueue()
        run, = self.claim()
        size = pybgworker.OUTPUT_CHUNK
        for n in range(20):
            self.note(printed=[self.printed(run, (n * size, "x" * size),
                                            size=(n + 1) * size)])
            self.assertLessEqual(self.left()[1], 2 + 2)
        self.assertEqual([row.seq // size for row in self.store.live_output(run.id, 1)],
                         [0, 1, 18, 19])

    def test_the_last_lines_of_a_dead_worker_s_run_are_its_output(self):
        """Also of one that a stop has interrupted."""
        for end, status in ((lambda run: self.store.reap(1, "w", self.now), "queued"),
                            (lambda run: self.turn(stopped=[run]), "queued")):
            add_workers(self.store, 1)
            self.enqueue()
            run, = self.claim()
            self.note(printed=[self.printed(run, (0, "x" * 16_000), (16_000, "x" * 16_000),
                                            (90_000, "the end"), size=90_007)])
            end(run)
            self.assertEqual(self.status(run.id), status)
            self.assertEqual(
                self.store.output(run.id),
                "x" * 32_000 + pybgworker.cut_mark(58_000) + "the end")
            self.assertEqual(self.left(), [0, 0])
            self.sql("update bg_task set state = 6 where state < 4")

    def test_nonsense_written_by_hand_harms_nobody(self):
        for cpu in ("'much'", "-5", "9e999", "1e300", "x'00'", "null"):
            worker = self.add(tasks=[pybgworker.KnownTask(0, "a", None, ("x",))])
            self.sql(f"update bg_worker set cpu = {cpu}, children_cpu = {cpu}, note = 5,"
                     f" state = x'00', memory = 'large' where id = {worker}")
            self.sql("update bg_worker_task set params = '{' where worker = ?", worker)
            self.assertEqual(self.store.known_tasks(), [(worker, "a", None, (), 0)])
            self.row(worker)
            self.store.remove_dead([self.row(worker)])
            self.assertEqual(self.sql("select count(*) from bg_worker"), [(2,)])
        own, childrens = self.store.departed_cpu()
        self.assertTrue(0 < own == childrens <= 1e12)

    def test_a_worker_of_an_older_version_has_said_nothing(self):
        """It has written neither these columns nor these tables."""
        row = self.row(1)
        self.assertEqual(row[-9:], (None,) * 9)
        self.assertEqual((self.store.known_tasks(), self.store.children()), ([], []))


# == History ==================================================================


def counts_of(runs=1, name="t", queue="q", **values):
    """Runs that ended all the same way."""
    counts = pybgworker.RunCounts()
    counts.add([Counting().ended(name=name, queue=queue, **values)] * runs)
    return counts


class Histories(QueueCase):

    START = 1_800_000_000       # of a quarter and of a day that is not full

    def add(self, second, runs=1, **values):
        """Runs that ended so many seconds after START."""
        with self.store.db.write() as link:
            pybgworker.add_history(link.connection, counts_of(runs, **values),
                                   (self.START + second) * 1000)

    def roll_up(self, second):
        """All that is to be done at this second after START."""
        passes = 0
        while self.store.roll_up((self.START + second) * 1000):
            passes += 1
            self.assertLess(passes, 1000)
        return passes

    def spans(self, span, since=0, until=10**6, **filters):
        """{seconds after START: runs} of what history() says."""
        found = {}
        for row in self.store.history(span, (self.START + since) * 1000,
                                      (self.START + until) * 1000, **filters):
            at = row.at - self.START
            found[at] = found.get(at, 0) + row.runs
        return found

    def sums(self):
        return sorted(self.store.totals())

    def test_runs_are_counted_in_the_minute_in_which_they_end(self):
        self.add(59)
        self.add(60, 2)
        self.add(119, 3, name="u")
        self.assertEqual(self.spans(60), {0: 1, 60: 5})
        self.assertEqual([(r.at - self.START, r.name, r.runs) for r in self.store.history(
            60, self.START * 1000, (self.START + 999) * 1000)],
            [(0, "t", 1), (60, "t", 2), (60, "u", 3)])

    def test_since_and_until_name_queue(self):
        for second, name, queue in ((0, "t", "q"), (60, "u", "q"), (120, "t", "r")):
            self.add(second, name=name, queue=queue)
        self.assertEqual(self.spans(60, 60, 121), {60: 1, 120: 1})
        self.assertEqual(self.spans(60, 119, 120), {60: 1})     # the span that holds 119
        self.assertEqual(self.spans(60, name="t"), {0: 1, 120: 1})
        self.assertEqual(self.spans(60, queue="q"), {0: 1, 60: 1})
        with mock.patch.object(pybgworker, "now_ms",
                               return_value=(self.START + 61) * 1000):
            self.assertEqual(len(self.store.history(60, self.START * 1000)), 2)

    def test_rows_by_time_and_by_name(self):
        for second, name, queue in ((0, "t", "q"), (0, "u", "q"), (60, "t", "q")):
            self.add(second, name=name, queue=queue)
        window = self.START * 1000, (self.START + 900) * 1000
        for span in (60, 900, 86_400):
            rows = self.store.history(span, *window)
            groups: dict = {}
            for row in rows:
                groups.setdefault(row.at, []).append(row)
            self.assertEqual(self.store.history(span, *window, by="at"),
                             [pybgworker.merged(same) for same in groups.values()])
            self.assertEqual(
                self.store.history(span, *window, by="name"),
                [pybgworker.merged(r for r in rows if r.name == name) for name in "tu"])
        for span, by in ((61, ""), (0, ""), (60, "state")):
            self.assertRaises(ValueError, self.store.history, span, *window, by=by)

    ROLL_UPS = """
        minutes with runs | at   | quarters     | open | passes
        0 1 14            | 1499 | 0:3          | 3    | 0
        0 1 14            | 1500 | 0:3          | 0    | 1
        0 1 15            | 1500 | 0:2 900:1    | 1    | 1
        0 1 15            | 2400 | 0:2 900:1    | 0    | 2
        3 40              | 3299 | 0:1 1800:1   | 1    | 1
        3 40              | 3300 | 0:1 1800:1   | 0    | 2
    """

    def test_a_quarter_is_rolled_up_ten_minutes_after_its_end(self):
        for line in self.ROLL_UPS.strip().splitlines()[1:]:
            self.sql("delete from bg_history")
            self.sql("delete from bg_meta where name = 'rolled_to'")
            minutes, at, quarters, is_open, passes = (
                part.strip() for part in line.split("|"))
            for minute in minutes.split():
                self.add(int(minute) * 60)
            before = self.sums()
            with self.subTest(line):
                self.assertEqual(self.roll_up(int(at)), int(passes))
                self.assertEqual(" ".join(f"{at}:{n}" for at, n in self.spans(900).items()),
                                 quarters)
                rolled, = self.sql("select ifnull(sum(runs), 0) from bg_history "
                                   "where span = 900")[0]
                self.assertEqual(len(minutes.split()) - rolled, int(is_open))
                self.assertEqual(self.sums(), before)
                self.assertEqual(sum(self.spans(86_400, -86_400).values()),
                                 len(minutes.split()))

    def test_no_sum_changes_through_a_roll_up(self):
        """Whatever comes in which order; random, and each failure prints its seed."""
        for seed in range(30):
            self.sql("delete from bg_history")
            self.sql("delete from bg_meta where name = 'rolled_to'")
            chance, second, runs = random.Random(seed), 0, 0
            for _ in range(60):
                second += chance.choice((0, 20, 60, 400, 900, 5000, -3000, -100))
                if chance.random() < 0.6:
                    state, kind = chance.choice(((4, None), (5, "crash"), (1, "timeout")))
                    self.add(second, name=chance.choice("tuv"), state=state, kind=kind,
                             waited=chance.choice((None, 3, 70, 9999)),
                             ran=chance.choice((0.001, 2.5, 70.0)), task_id=second % 97 + 1)
                    runs += 1
                else:
                    before = self.sums()
                    self.roll_up(second)
                    with self.subTest(seed=seed, second=second):
                        self.assertEqual(self.sums(), before)
            total = pybgworker.merged(self.sums())
            with self.subTest(seed=seed):
                self.assertEqual((total.runs, sum(total.ran)), (runs, runs))
                self.assertEqual(total.succeeded + total.crashed + total.timeouts, runs)

    def test_the_readme_says_what_is_kept(self):
        text = " ".join((HERE / "README.md").read_text(encoding="utf-8").split())
        kept = pybgworker.HISTORY_KEPT
        for fact in (
            f"Counts by the minute are kept for {kept[60] // 3600} hours",
            f"by the quarter of an hour for {kept[900] // 86_400} days",
            f"by the day (in UTC) for {kept[86_400] // 86_400} days",
            f"at most {pybgworker._MOST_ROWS:,} rows",
            f"{pybgworker.MOST_GROUPS:,} pairs of task and queue",
            f"counted in {len(pybgworker.HISTORY_BOUNDS) + 1} classes",
        ):
            with self.subTest(fact):
                self.assertIn(fact, text)
        self.assertEqual(pybgworker._TALLY_SECONDS, 0.1)
        self.assertEqual((pybgworker.QUARTER + pybgworker._LATE_SECONDS) / 60, 25)

    def test_of_two_workers_that_roll_up_at_once_one_does_it(self):
        self.add(0, 5)
        self.add(60, 2)
        other, before = SqliteStore(str(self.db)), self.sums()
        self.addCleanup(other.close)
        now = (self.START + 3000) * 1000
        enter, started = pybgworker.Transaction.__enter__, []

        def late(transaction):              # the first waits for the lock
            if not started:
                started.append(None)
                started[0] = other.roll_up(now)
            return enter(transaction)

        with mock.patch.object(pybgworker.Transaction, "__enter__", late):
            self.assertTrue(self.store.roll_up(now))
        self.assertEqual(started, [True])
        self.assertEqual(self.spans(900), {0: 7})
        self.assertEqual(self.sums(), before)
        self.assertEqual(self.sql("select span, sum(runs) from bg_history group by 1"),
                         [(0, 7), (60, 7), (900, 7), (86_400, 7)])

    def test_what_comes_after_its_quarter_was_rolled_up_is_counted_in_the_next(self):
        """By a worker that waited for the database, or whose clock is behind."""
        self.add(0)
        self.roll_up(1500)
        self.add(30)
        self.assertEqual(self.spans(60), {0: 1, 900: 1})
        self.assertEqual(pybgworker.merged(self.sums()).runs, 2)

    def test_a_clock_set_back_goes_on_at_the_next_quarter(self):
        day = 86_400
        self.add(0)
        self.add(3 * day, 4)                # by a clock that was ahead
        self.roll_up(3 * day + 3000)
        self.add(3 * day + 3100, 8)         # … and not rolled up
        before = self.sums()
        self.add(200, 16)                   # it was set back
        self.assertEqual(self.spans(60, 0, 3000), {})
        self.roll_up(200)
        self.add(300, 32)
        self.assertEqual(self.spans(60, 0, 10 * day), {900: 32})
        self.assertEqual(pybgworker.merged(self.sums()).runs,
                         pybgworker.merged(before).runs + 48)
        self.add(1000, 64)
        self.roll_up(2500)
        self.assertEqual(self.spans(900, 0, 10 * day), {0: 1, 900: 96})
        self.assertEqual(pybgworker.merged(self.sums()).runs, 1 + 4 + 8 + 16 + 32 + 64)

    def test_rows_are_kept_for_three_hours_eight_days_and_four_hundred_days(self):
        hour, day = 3600, 86_400
        self.add(0)
        self.roll_up(1500)
        for second, wanted in ((3 * hour, 4), (3 * hour + 1, 3), (8 * day, 3),
                               (8 * day + 1, 2), (399 * day, 2), (400 * day, 1)):
            self.roll_up(second)
            with self.subTest(second):
                self.assertEqual(self.sql("select count(*) from bg_history")[0][0], wanted)
        self.assertEqual(self.sums()[0].runs, 1)

    def test_minutes_that_are_not_rolled_up_are_kept_however_old(self):
        self.add(0)
        self.add(90_000)
        self.assertTrue(self.store.roll_up((self.START + 10**7) * 1000))
        self.assertEqual(pybgworker.merged(self.sums()).runs, 2)
        self.roll_up(10**7)
        self.assertEqual(pybgworker.merged(self.sums()).runs, 2)

    def test_above_the_cap_the_oldest_quarters_go_and_then_days(self):
        with mock.patch.object(pybgworker, "_MOST_ROWS", 10):
            for n in range(8):
                self.add(n * 900, name=f"t{n}")
            self.roll_up(20_000)
            self.assertEqual(list(self.spans(900)), [])     # 8 since ever, 1 … 8 of days
            self.assertEqual(self.sql("select count(*) from bg_history")[0][0], 8)
        self.assertEqual(pybgworker.merged(self.sums()).runs, 8)
        self.sql("delete from bg_history")
        self.sql("delete from bg_meta where name = 'rolled_to'")
        with mock.patch.object(pybgworker, "_MOST_ROWS", 6):
            for n in range(8):
                self.add(n * 900)
            self.roll_up(20_000)
            self.assertEqual(list(self.spans(900)), [n * 900 for n in (4, 5, 6, 7)])

    def test_a_roll_up_tells_a_thousand_groups_apart(self):
        counts = pybgworker.RunCounts()
        counts.add([Counting().ended(n, f"t{n}") for n in range(1, 1000)])
        more = pybgworker.RunCounts()       # of another worker
        more.add([Counting().ended(n, f"u{n}") for n in range(1, 9) for _ in "ab"])
        with self.store.db.write() as link:
            for each in (counts, more):
                pybgworker.add_history(link.connection, each, self.START * 1000)
        self.roll_up(2000)
        for rows in (self.store.history(900, self.START * 1000, 10**16), self.sums()):
            names = {row.name: row.runs for row in rows}
            self.assertEqual(len(names), 1001)
            self.assertEqual((names["u1"], names["(other)"]), (2, 7))
            self.assertEqual(sum(names.values()), 999 + 16)

    def test_hostile_names_are_kept_as_they_are(self):
        names = ("'; drop table bg_task; --", "<img src=x>", "\x1b[2J", "a\0b", "", "ß" * 999,
                 "(other)", ":name")
        for name in names:
            self.add(0, name=name, queue=name)
        self.roll_up(2000)
        for rows in (self.sums(), self.store.history(60, self.START * 1000, 10**16)):
            self.assertEqual(sorted((r.name, r.queue) for r in rows),
                             sorted((name, name) for name in names))
        self.assertEqual(self.spans(900, name=names[0]), {0: 1})

    def test_numbers_written_by_hand_break_nothing(self):
        self.add(0, name="a")
        self.add(60, name="b")
        self.sql("update bg_history set runs = 'many', r7 = 1e300, ran_ms = ?, lo = 'x', "
                 "failed = 9.5, w1 = x'00' where name = 'a'", 2**63 - 1)
        self.add(0, name="a")
        for rows in (self.sums(), self.store.history(60, self.START * 1000, 10**16)):
            for row in rows:
                self.assertEqual({*map(type, (*row[4:-2], *row.ran, *row.waited))}, {int})
        self.roll_up(2000)
        self.assertEqual(self.spans(900, name="b"), {0: 1})
        self.sql("update bg_meta set value = 123456789012345 where name = 'rolled_to'")
        self.add(3000, name="b")
        self.roll_up(3000)
        self.add(3660, name="b")
        self.assertEqual(self.spans(60, 3600, name="b"), {3660: 1})
        self.assertEqual(self.sums()[-1].runs, 3)

    def runs(self):
        """{word: number} of what is not 0 in the sum since ever."""
        total = pybgworker.merged(self.store.totals())
        words = ("runs", *Counting.WORDS)
        return {word: getattr(total, word) for word in words if getattr(total, word)}

    def test_a_turn_adds_what_it_writes_to_what_was_kept(self):
        self.enqueue(count=4)
        runs = self.claim()
        kept = counts_of(2, name="t", queue="default")
        self.turn(outcomes=[Outcome(runs[0], pybgworker.SUCCESS, "1")])
        self.assertEqual(self.runs(), {})
        self.turn(history=kept, outcomes=[
            Outcome(runs[1], pybgworker.SUCCESS, "1", duration=0.1),
            Outcome(runs[2], pybgworker.RETRYING, run_at=self.now,
                    error={"kind": "crash"}, started_at=self.now + 30)])
        self.assertEqual(self.runs(), {"runs": 4, "succeeded": 3, "retried": 1, "crashed": 1})
        row, = self.store.history(60, self.now - 60_000, self.now + 60_000)
        self.assertEqual((row.at, row.lo, row.hi), (self.now // 60_000 * 60, 1, 3))
        self.assertEqual((row.ran_ms, row.waited_ms), (500, 1030))

    def test_what_is_stale_or_never_began_is_not_counted(self):
        self.enqueue(count=4)
        stale, unbegun, stopped, cancelled = self.claim()
        self.sql("update bg_task set worker = 2 where id = ?", stale.id)
        self.turn(history=pybgworker.RunCounts(), unbegun=[unbegun], stopped=[stopped],
                  outcomes=[Outcome(stale, pybgworker.SUCCESS, "1", duration=0.1),
                            Outcome(cancelled, pybgworker.CANCELLED)])
        self.assertEqual(self.runs(), {})

    def test_a_retry_that_was_cancelled_meanwhile_is_counted_as_cancelled(self):
        self.enqueue()
        run, = self.claim()
        self.store.cancel(run.id, self.now)
        self.turn(history=pybgworker.RunCounts(), outcomes=[Outcome(
            run, pybgworker.RETRYING, error={"kind": "timeout"}, duration=0.1)])
        self.assertEqual(self.runs(), {"runs": 1, "cancelled": 1, "timeouts": 1})

    def test_what_a_dead_worker_ran_is_counted_as_lost(self):
        self.enqueue(retries=0)
        self.enqueue(retries=1)
        again, failed, cancelled, unbegun = (
            self.enqueue(retries=1), self.enqueue(retries=0), self.enqueue(), self.enqueue())
        self.sql("update bg_task set state = 4 where id < ?", again)
        runs = self.claim()
        self.store.cancel(cancelled, self.now)
        begun = {(run.id, run.attempt) for run in runs if run.id != unbegun}
        self.store.reap(1, "w", self.now, begun=begun)
        self.assertEqual(self.status(failed), "failed")
        self.assertEqual(self.runs(), {"runs": 3, "lost": 3, "retried": 1, "failed": 1,
                                       "cancelled": 1})
        row, = self.store.totals()
        self.assertEqual((row.lo, row.hi, sum(row.ran), sum(row.waited)),
                         (again, cancelled, 0, 0))
        self.store.reap(1, "w", self.now)
        self.assertEqual(self.runs()["runs"], 3)

    def test_reading_writes_nothing(self):
        self.add(0)
        before = self.store.db.link().commits
        self.spans(60), self.spans(900), self.sums()
        self.assertFalse(self.store.roll_up(self.START * 1000))
        self.assertEqual(self.store.db.link().commits, before)

    def test_pieces_of_a_large_history_are_read_by_the_index(self):
        for statement in self.traced(lambda: (self.spans(60), self.spans(900),
                                              self.sums(), self.roll_up(0))):
            if not statement.lstrip().startswith("select count(*)"):
                for row in self.sql("explain query plan " + statement):
                    self.assertNotRegex(row[-1], "SCAN (TABLE )?bg_history")


# == Endings ==================================================================


class Finishing(QueueCase):

    def test_a_stale_finish_changes_nothing(self):
        task_id = self.enqueue()
        run, = self.claim(worker=1)
        self.store.reap(1, "w", self.now)
        again, = self.claim(worker=2)
        for state in (pybgworker.SUCCESS, pybgworker.FAILED, pybgworker.RETRYING):
            stale = self.finish(run, state, result="1", error={"kind": "exception"})
            self.assertEqual(len(stale), 1)
        self.assertEqual(self.status(task_id), "running")
        self.assertEqual(self.finish(run, result="1"), [Outcome(run, 4, "1")])
        self.assertEqual(self.finish(again, worker=2, result="2"), [])
        self.assertEqual(self.store.outcome(task_id)[1], "2")

    def test_one_stale_outcome_spoils_no_other(self):
        self.enqueue(count=3)
        runs = self.claim()
        self.sql("update bg_task set worker = 9 where id = 2")
        outcomes = [Outcome(run, pybgworker.SUCCESS, "1") for run in runs]
        self.assertEqual(self.turn(outcomes=outcomes).stale, [outcomes[1]])
        self.assertEqual([self.status(n) for n in (1, 2, 3)],
                         ["success", "running", "success"])

    def test_large_results_errors_and_output_are_kept_apart(self):
        self.enqueue()
        run, = self.claim()
        text = json.dumps("x" * 5000)
        self.finish(run, result=text, output="printed")
        self.assertEqual(self.store.outcome(1)[1], text)
        self.assertEqual(self.store.output(1), "printed")
        self.assertEqual(self.sql("select result from bg_task"), [(None,)])

    def test_what_follows_is_committed_with_the_outcome_or_not_at_all(self):
        then = pybgworker.callback_rows
        for state, kind in ((pybgworker.SUCCESS, "on_success"),
                            (pybgworker.FAILED, "on_failure")):
            task_id = self.enqueue("t", "q", 7)
            run, = self.claim(callbacks={"t": 3})
            error = {"kind": "exception"} if kind == "on_failure" else None
            rows = then(run, state, error, self.now, "w")
            self.assertEqual(len(self.finish(run, state, worker=9, then=rows)), 1)
            self.assertEqual(self.store.tasks(name="t:" + kind), [])
            self.finish(run, state, error=error, then=rows)
            row, = self.store.tasks(name="t:" + kind)
            with self.subTest(kind):
                self.assertEqual((row.status, row.queue, row.priority, row.timeout),
                                 ("queued", "q", 7, 60.0))
                args = [task_id] if error is None else [task_id, error]
                self.assertEqual(self.store.args(row.id), json.dumps(
                    [args, {}], separators=(",", ":")))
            self.sql("delete from bg_task where name != 't'")
        self.assertEqual(then(run, pybgworker.RETRYING, None, self.now, "w"), ())
        run.callbacks = 1
        self.assertEqual(then(run, pybgworker.FAILED, {}, self.now, "w"), ())

    def kept(self, task_id):
        """(error, output, progress) that are kept of a task."""
        store = self.store
        return store.error(task_id), store.output(task_id), store.progress(task_id)

    def run_once(self, state, progress=None, **values):
        run, = self.claim()
        if progress is not None:
            self.turn(progress=[(run, json.dumps([progress, None]))])
        self.assertEqual(self.finish(run, state, run_at=self.now, **values), [])
        self.sql("update bg_task set state = 2 where state = 1")
        return run

    def test_what_an_attempt_before_has_left_is_not_shown_as_that_of_the_last(self):
        error = {"kind": "exception"}
        lasts = (
            ({}, (None, None, None)),
            (dict(output="b", progress=7), (None, "b", [7, None])),
            (dict(state=pybgworker.FAILED, error={"kind": "crash"}),
             ({"kind": "crash"}, None, None)),
        )
        for last, wanted in lasts:
            with self.subTest(last=last):
                task_id = self.enqueue()
                self.run_once(pybgworker.RETRYING, 40, error=error, output="a",
                              result="2" * 2000)
                self.assertEqual(self.kept(task_id), (error, "a", None))
                self.run_once(**{"state": pybgworker.SUCCESS, "result": "1", **last})
                self.assertEqual(self.kept(task_id), wanted)

    def test_progress_of_a_lost_or_interrupted_run_is_not_that_of_the_next(self):
        for how in ("lost", "interrupted"):
            task_id = self.enqueue()
            run, = self.claim()
            self.turn(progress=[(run, "[40,null]")])
            if how == "lost":
                self.store.reap(1, "w", self.now)
                add_workers(self.store, 1)
            else:
                self.turn(stopped=[run])
            with self.subTest(how):
                self.assertIsNone(self.store.progress(task_id))
                self.finish(self.claim()[0], pybgworker.SUCCESS, result="1")
                self.assertEqual(self.kept(task_id), (None, None, None))

    def test_a_run_that_is_over_says_nothing_of_the_progress_of_the_next(self):
        """Not even to the worker that has claimed both."""
        task_id = self.enqueue()
        old, = self.claim()
        self.turn(stopped=[old])
        new, = self.claim()
        self.turn(progress=[(old, "[40,null]")])
        self.assertIsNone(self.store.progress(task_id))
        self.turn(progress=[(new, "[10,null]")])
        self.assertEqual(self.store.progress(task_id), [10, None])

    def test_a_run_that_never_began_is_not_counted(self):
        self.enqueue(retries=0)
        run, = self.claim()
        self.turn(unbegun=[run])
        row = self.store.task(1)
        self.assertEqual((row.status, row.attempt, row.forgiven), ("queued", 0, 0))

    def test_an_interrupted_run_is_forgiven_under_a_new_number(self):
        self.enqueue(retries=0)
        run, = self.claim()
        self.turn(stopped=[run])
        again, = self.claim()
        self.assertEqual((again.attempt, again.used, again.is_last), (2, 1, True))

    def test_a_cancelled_run_is_not_run_again(self):
        self.enqueue()
        run, = self.claim()
        self.store.cancel(1, self.now)
        self.assertEqual(self.store.cancels_asked(1), [1])
        self.finish(run, pybgworker.RETRYING, run_at=self.now + 5,
                    error={"kind": "exception"})
        self.assertEqual(self.status(1), "cancelled")


# == Lists ====================================================================


class Listing(QueueCase):

    def ids(self, filter=Filter(), **options):
        return [row.id for row in self.store.page(filter, **options).rows]

    def every_page(self, filter, limit=3, **options):
        """The ids of each page, to the end."""
        pages, before = [], None
        while not pages or before is not None:
            page = self.store.page(filter, before, limit, **options)
            pages.append([row.id for row in page.rows])
            before = page.next
        return pages

    def test_queues_are_counted_and_the_oldest_may_run(self):
        self.enqueue("t", "mail", count=2)
        self.sql("update bg_task set run_at = run_at - 60000 where id = 2")
        self.enqueue("u", "mail", at=self.now + 5000)
        self.enqueue("t", "late", at=self.now + 9000)
        self.enqueue("t", "work")
        self.claim(queues=["work"])
        self.store.pause("idle", self.now, By("ann", "cli"), "SMTP is down")
        QueueRow = pybgworker.QueueRow
        self.assertEqual(self.store.queues(self.now), [
            QueueRow("idle", paused_at=self.now, paused_by="ann", reason="SMTP is down"),
            QueueRow("late", scheduled=1, next_at=self.now + 9000),
            QueueRow("mail", scheduled=1, queued=2, oldest_at=self.now - 60000,
                     next_at=self.now + 5000),
            QueueRow("work", running=1)])
        later = self.store.queues(self.now + 9001)      # due, and nobody has readied it
        self.assertEqual(later[1].oldest_at, self.now + 9000)
        self.assertIsNone(later[1].next_at)

    def test_waiting_names_are_those_of_what_is_ready(self):
        for queue, name in (("b", "u"), ("a", "t"), ("a", "u"), ("a", "t")):
            self.enqueue(name, queue)
        self.enqueue("v", at=self.now + 1000)
        self.enqueue("alone", "c")
        self.sql("update bg_task set alone = 1 where name = 'alone'")
        names = [("a", "t"), ("a", "u"), ("b", "u"), ("c", "alone")]
        self.assertEqual(self.store.waiting_names(9), names)
        self.assertEqual(self.store.waiting_names(2), names[:2])

    def test_each_state_has_its_order_and_pages_go_on(self):
        self.enqueue(count=7)
        self.sql("update bg_task set priority = 9 where id = 1")
        self.sql("update bg_task set alone = 1 where id = 3")
        claims = [2, 3, 4, 5, 6, 7, 1]
        for filter in (Filter(pybgworker.QUEUED), Filter(pybgworker.QUEUED, "t"),
                       Filter(pybgworker.QUEUED, queue="default", since=1)):
            with self.subTest(filter):
                self.assertEqual(self.every_page(filter), [claims[:3], claims[3:6], [1]])
        self.assertEqual(self.every_page(Filter()), [[7, 6, 5], [4, 3, 2], [1]])
        for state in (pybgworker.FAILED, pybgworker.CANCELLED):
            self.sql("update bg_task set state = ?, finished_at = 100 - id % 3", state)
            order = [[6, 3, 7], [4, 1, 5], [2]]
            self.assertEqual(self.every_page(Filter(state)), order)
            self.assertEqual(self.every_page(Filter(state, "t", "default")), order)
        for state in (pybgworker.SCHEDULED, pybgworker.RETRYING):
            self.sql("update bg_task set state = ?, run_at = id % 3", state)
            self.assertEqual(self.every_page(Filter(state, "t")), [[3, 6, 1], [4, 7, 2], [5]])
        self.sql("update bg_task set state = 3, worker = id % 2")
        self.assertEqual(self.every_page(Filter(pybgworker.RUNNING)),
                         [[7, 6, 5], [4, 3, 2], [1]])

    def test_a_page_goes_on_from_an_id_too_but_from_nothing_else(self):
        self.enqueue(count=5)
        self.assertEqual(self.ids(before=3), [2, 1])
        self.assertEqual(self.ids(Filter(pybgworker.QUEUED), before="3"), [4, 5])
        self.sql("update bg_task set state = 5, finished_at = id")
        self.assertEqual(self.ids(Filter(pybgworker.FAILED), before=3), [2, 1])
        for before in ("x", "", "1;2", "1~2~3~4", "~", 99, "9" * 40, "\x00", "1e5"):
            with self.subTest(before):
                self.assertRaisesRegex(pybgworker.OptionError, "no page goes on from",
                                       self.ids, Filter(pybgworker.FAILED), before=before)

    def test_text_is_looked_for_in_name_arguments_and_error(self):
        self.enqueue("mail.send", args=pybgworker.encode_call(("Müller 100%",), {}))
        self.enqueue("t", args=pybgworker.encode_call(("x" * 3000 + "needle",), {}))
        self.enqueue("t", retries=0)
        run = self.claim()[-1]
        error = {"kind": "exception", "type": "KeyError", "message": "no such thing",
                 "traceback": "in nowhere"}
        self.finish(run, pybgworker.FAILED, error=error)
        for text, found in (("MAIL", [1]), ("Müller", [1]), ("100%", [1]), ("1_0", []),
                            ("Needle", [2]), ("such thing", [3]), ("nowhere", []),
                            ("traceback", [])):
            with self.subTest(text):
                self.assertEqual(self.ids(Filter(text=text)), found)
        self.assertEqual(self.ids(Filter(error="KeyError")), [3])
        self.assertEqual(self.ids(Filter(pybgworker.FAILED, error="exception")), [3])
        self.assertEqual(self.ids(Filter(error="Key")), [])
        self.assertEqual(self.ids(Filter(text="e"), match=lambda row, args, error: row.id == 2),
                         [2])

    def test_a_search_stops_when_its_time_is_up_and_goes_on_from_there(self):
        self.fill(50_000)
        self.enqueue("rare")
        self.sql("update bg_task set name = 'rare' where id in (5, 30000)")
        ticks = iter(range(1000))
        page = self.store.page(Filter(name="rare"), clock=lambda: next(ticks), seconds=1)
        self.assertEqual([row.id for row in page.rows], [50_001])
        self.assertEqual(page[1:], ("30002", 30_002, 0))
        self.assertEqual(self.ids(Filter(name="rare"), before=page.next), [30_000, 5])
        self.assertIsNone(self.store.page(Filter(name="rare"), seconds=9).next)

    def test_failures_come_newest_first_however_their_errors_were_edited(self):
        bodies = ('{"kind":"crash","type":"SIGSEGV","message":"m"}', "{bad", "[]", "7",
                  '{"kind":3}', None, '{"kind":"x","message":[1]}')
        self.enqueue(count=len(bodies))
        self.sql("update bg_task set state = 5, finished_at = 1000 + id")
        for number, body in enumerate(bodies, 1):
            if body is not None:
                self.sql("insert into bg_payload values (?, ?)", number * 8 + 2, body)
        found = self.store.failures(1001)
        self.assertEqual([row.id for row in found], [7, 6, 5, 4, 3, 2, 1])
        self.assertEqual(found[-1],
                         (1, "t", "default", 1001, "crash", "SIGSEGV", "m"))
        self.assertEqual([row.message for row in found[:-1]],
                         ["[1]", "", "", "7", "[]", "{bad"])
        self.assertEqual([row.id for row in self.store.failures(1006)], [7, 6])
        self.assertEqual(len(self.store.failures(0, limit=2)), 2)
        pybgworker.list_report(self.store, None, None, None, 9)

    def test_events_are_those_of_people_and_the_newest_are_kept(self):
        ann = By("ann", "cli")
        self.store.note_event(ann, "late", "nightly", None, self.now)
        self.sql("""with recursive n (i) as (select 2 union all select i + 1 from n
            where i < 10000) insert into bg_event select i, 1, 'a', 'b', 'c', 'd', null from n""")
        self.store.note_event(By("bob", "web"), "run", "nightly", "why not", self.now)
        event = self.store.events(limit=1)[0]
        self.assertEqual(event, (10_001, self.now, "bob", "web", "run", "nightly", "why not"))
        self.assertEqual([e.id for e in self.store.events(before=4)], [3, 2])
        self.assertEqual(self.sql("select count(*) from bg_event"), [(10_000,)])


# == Desk =====================================================================


class Operating(QueueCase):

    def act(self, action, what, **options):
        """To the end: how many were done, and how many skipped."""
        done = skipped = 0
        acted = pybgworker.Acted(0, 0, 1)
        while acted.left:
            acted = self.store.act(action, what, self.now, after=acted.next, **options)
            done, skipped = done + acted.done, skipped + acted.skipped
        return done, skipped

    def test_what_a_person_does_is_written_down_with_it(self):
        self.enqueue(count=4)
        self.sql("update bg_task set state = 5, finished_at = 1 where id = 3")
        ann, store = By("ann", "cli"), self.store
        store.cancel(1, self.now, ann)
        store.cancel(1, self.now, ann)              # does nothing
        store.retry(1, self.now, ann)
        store.forget(1, ann)
        store.act("cancel", [2], self.now, ann)
        store.act("retry", Filter(), self.now, ann)
        store.purge("default", None, self.now, ann)
        store.pause("mail", self.now, ann, "down")
        store.resume("mail", ann)
        store.resume("mail", ann)
        store.prune(0, self.now + 1, self.now + 1, 9, ann, self.now)
        self.assertEqual([event[2:] for event in reversed(store.events())], [
            ("ann", "cli", "cancel", "1", None), ("ann", "cli", "retry", "1", None),
            ("ann", "cli", "forget", "1", None), ("ann", "cli", "cancel", "2", None),
            ("ann", "cli", "retry", "state failed", "1 tasks"),
            ("ann", "cli", "cancel", "queue default", "2 tasks"),
            ("ann", "cli", "pause", "mail", "down"), ("ann", "cli", "resume", "mail", None),
            ("ann", "cli", "prune", "what has finished", "3 tasks")])

    def test_cancel_ends_what_waits_and_leaves_what_is_finished(self):
        self.enqueue()
        later = self.enqueue(at=self.now + 1000)
        for task_id in (1, later):
            self.store.cancel(task_id, self.now)
            self.assertEqual(self.status(task_id), "cancelled")
        self.assertEqual(self.store.cancel(1, self.now), pybgworker.CANCELLED)

    def test_retry_gives_all_retries_back_under_new_numbers(self):
        self.enqueue(retries=0)
        run, = self.claim()
        self.finish(run, pybgworker.FAILED, error={"kind": "exception"})
        self.store.retry(1, self.now)
        again, = self.claim()
        self.assertEqual((again.attempt, again.used, again.is_last), (2, 1, True))
        self.assertIsNone(self.store.error(1))

    def test_retry_refuses_what_is_unfinished_or_whose_key_is_taken(self):
        self.enqueue(key="k")
        self.assertRaisesRegex(pybgworker.TaskStateError, "is queued: only a finished",
                               self.store.retry, 1, self.now)
        self.store.cancel(1, self.now)
        self.enqueue(key="k")
        self.assertRaisesRegex(pybgworker.TaskStateError, "its key is unfinished",
                               self.store.retry, 1, self.now)

    def test_purge_cancels_what_waits_by_queue_and_name(self):
        self.enqueue("t", "a")
        self.enqueue("t", "b")
        self.enqueue("u", "a", at=self.now + 1000)
        self.assertEqual(self.store.purge("a", "t", self.now), 1)
        self.assertEqual(self.store.purge("a", None, self.now), 1)
        self.assertEqual(self.store.purge(None, None, self.now), 1)

    def test_prune_keeps_what_is_young_unfinished_or_failed(self):
        self.enqueue(count=4)
        runs = self.claim(free=3)
        self.finish(runs[0], result=json.dumps("x" * 5000))
        self.finish(runs[1], pybgworker.FAILED, error={"kind": "exception"})
        self.assertEqual(self.store.prune(0, self.now, self.now, 10), (0, 0))
        self.assertEqual(self.store.prune(0, self.now + 1, None, 10), (1, 0))
        self.assertEqual(self.store.prune(0, None, self.now + 1, 2)[0], 1)
        self.assertEqual(self.sql("select count(*) from bg_task"), [(2,)])
        self.assertEqual(self.sql("select count(*) from bg_payload"), [(0,)])

    def between(self, statement):
        """Run SQL of somebody else's just before our next transaction begins."""
        def late(transaction):
            patched.stop()
            self.sql(statement)
            return transaction.__enter__()

        patched = mock.patch.object(pybgworker.Transaction, "__enter__", late)
        patched.start()

    def test_what_changed_between_the_look_and_the_lock_is_left_alone(self):
        self.enqueue(count=3)
        self.sql("update bg_task set state = 5, finished_at = 1")
        self.between("update bg_task set state = 2, finished_at = null where id = 2")
        self.assertEqual(self.store.prune(0, self.now, self.now, 10)[0], 2)
        self.assertEqual(self.sql("select id from bg_task"), [(2,)])

        self.enqueue(count=2)
        self.between("update bg_task set state = 3, worker = 1 where id = 4")
        self.assertEqual(self.store.purge(None, None, self.now), 2)
        self.assertEqual(self.status(4), "running")

        self.sql("update bg_task set state = 5")
        self.between("update bg_task set state = 6 where id = 4")
        acted = self.store.act("retry", Filter(), self.now)
        self.assertEqual(acted, (2, 1, 0, None, {"is cancelled": 1}))
        self.assertEqual(self.status(4), "cancelled")

    def test_a_worker_that_beats_before_the_lock_is_not_reaped(self):
        self.enqueue()
        run, = self.claim()
        row = self.store.workers()[0]
        self.between("update bg_worker set beat_at = 2")
        self.assertEqual(self.store.reap(1, "w", self.now, row.beat_at), [])
        self.between("update bg_worker set beat_at = 3")
        self.store.remove_dead(self.store.workers())
        self.assertEqual([w.id for w in self.store.workers()], [1, 2])
        self.assertEqual(self.finish(run), [])

    def test_commands_about_many_tasks_work_in_batches(self):
        """No transaction holds the lock for long, and the log stays small."""
        self.fill(20_000, name="iif(i % 2, 't', 'u')")
        self.sql("update bg_task set state = 5, finished_at = 1, key = 'k' || (id / 3)")
        self.store.db.checkpoint()
        self.assertEqual(self.act("retry", Filter(name="t")), (6667, 3333))
        self.assertLess(self.store.db.wal_bytes(), 12 << 20)
        self.assertEqual(self.store.purge(None, "t", self.now), 6667)
        self.assertLess(self.store.db.wal_bytes(), 12 << 20)

    def test_an_id_by_hand_that_no_program_gives_is_refused(self):
        self.enqueue()
        for task_id in (1 << 60, 1 << 62, 10 ** 15 + 1, 0, -1):
            with self.assertRaises(sqlite3.IntegrityError):
                self.sql("update bg_task set id = ?", task_id)
        self.sql("update bg_task set id = ?", 10 ** 15 - 1)
        large = self.enqueue(args=json.dumps([["x" * 3000], {}]))
        self.finish(self.claim()[1], result='"' + "y" * 3000 + '"')
        self.assertEqual(len(self.store.outcome(large)[1]), 3002)

    def test_an_unknown_id_is_not_found(self):
        for task_id in (0, -1, 99, 1 << 70, 1 << 61, "7", None, 1.5):
            for verb in (self.store.task, self.store.state, self.store.args,
                         self.store.outcome, self.store.progress):
                if verb in (self.store.outcome, self.store.progress) and task_id == 99:
                    continue
                self.assertRaises(pybgworker.TaskNotFound, verb, task_id)
        self.assertRaises(pybgworker.TaskNotFound, self.store.cancel, 99, self.now)
        self.assertRaises(pybgworker.TaskNotFound, self.store.retry, 99, self.now)
        self.assertRaises(pybgworker.TaskNotFound, self.store.forget, 99)

    def test_a_state_written_by_hand_is_named_and_survived(self):
        self.enqueue()
        self.sql("update bg_task set state = 42")
        self.assertEqual(self.status(1), "unknown state 42")
        self.assertRaisesRegex(pybgworker.TaskStateError, "unknown state 42",
                               self.store.retry, 1, self.now)
        self.assertEqual(self.claim(), [])
        pybgworker.inspect_report(self.store, self.now, 15)

    def test_a_running_task_is_not_forgotten(self):
        self.enqueue()
        self.claim()
        self.assertRaises(pybgworker.TaskStateError, self.store.forget, 1)


class Budgets(QueueCase):
    """What may not grow unseen: query plans, statements, pages written."""

    def life(self):
        self.enqueue(count=3)
        runs = self.claim()
        self.finish(runs[0], result="1")
        self.finish(runs[1], pybgworker.RETRYING, run_at=self.now, error={"kind": "x"})
        self.turn(unbegun=[runs[2]])
        self.store.cancels_asked(1)
        for queues in (None, ("default", "other")):
            with mock.patch.object(pybgworker.Look, "_offer_in_order", return_value=False):
                self.store.peek(self.order(queues=queues, t=0.1), self.now)
        self.sql("update bg_task set alone = 1 where id = ?", runs[2].id)
        self.store.peek(self.order(alone=1, most={"t": 3}), self.now)
        self.turn(unbegun=self.claim(free=1, alone=1))
        self.store.cancel(runs[1].id, self.now)
        self.store.retry(runs[0].id, self.now)
        self.store.reap(1, "w", self.now)
        add_workers(self.store, 1)

    def test_every_hot_statement_uses_its_index(self):
        self.enqueue(count=500)
        self.life()
        statements = {s for s in self.traced(self.life)
                      if re.match(r"\s*(select|update|delete)", s)}
        self.assertGreater(len(statements), 12)
        for statement in statements:
            plan = self.sql("explain query plan " + statement)
            for row in plan:
                with self.subTest(" ".join(statement.split())[:90]):
                    self.assertNotRegex(row[-1], "SCAN (TABLE )?bg_(task|worker)(?! USING)")
                    self.assertNotIn("TEMP B-TREE", row[-1])

    def test_history_and_what_waits_cost_a_claim_nothing(self):
        self.enqueue(count=100)
        few = self.steps(lambda: self.claim(free=10))
        self.enqueue(count=20_000)
        self.enqueue("unknown", priority=0, count=20_000)
        self.enqueue(priority=0, at=self.now + 10**6, count=20_000)
        self.sql("update bg_task set state = 4 where id between 1000 and 9000")
        self.store.pause("stopped", self.now)
        self.enqueue(queue="stopped", priority=0, count=20_000)
        many = self.steps(lambda: self.claim(free=10))
        self.assertLess(many, few + 2000)           # the rows and seeks it may pass

    def test_a_full_kind_in_front_costs_a_look_a_few_rows_and_seeks(self):
        mine = self.enqueue("u", priority=9)
        order = {"free": 0, "beside": 1000, "beside_names": "u"}
        few = self.steps(lambda: self.store.peek(self.order(**order), self.now))
        self.fill(100_000)
        for queues in (None, ("default", "other")):
            def look(queues=queues):
                return self.store.peek(self.order(queues=queues, **order), self.now)

            with self.subTest(queues=queues):
                self.assertEqual([run.id for run in look()[1].runs], [mine])
                self.assertLess(self.steps(look), few + 2000)
                self.assertLess(len(self.traced(look)), 12)

    def test_runs_at_a_time_are_counted_with_a_seek_for_each_worker(self):
        """However many of other names run, and however many rows of workers there are.
        """
        self.enqueue("u")
        order = self.order(most={"u": 5})
        few = self.steps(lambda: self.store.peek(order, self.now))
        add_workers(self.store, *range(3, 3000))
        self.fill(20_000)
        self.sql("update bg_task set state = 3, worker = 1 + id % 9 where name = 't'")
        self.assertLess(self.steps(lambda: self.store.peek(order, self.now)), few + 500)
        self.fill(20_000, name="'u'")
        self.sql("update bg_task set state = 3, worker = 4 where name = 'u' and id > 100")
        found, _ = self.store.peek(order, self.now)
        self.assertFalse(found)
        self.assertLess(self.steps(lambda: self.store.peek(order, self.now)), few + 700)

    def test_kinds_and_limits_of_runs_cost_others_no_statement(self):
        self.enqueue(count=10)
        plain = self.traced(lambda: self.claim(free=2))
        self.turn(unbegun=self.claimed.runs)
        order = {"most": {"v": 1}, "alone": 2, "beside_names": "u", "beside": 9}
        self.assertEqual(len(self.traced(lambda: self.claim(free=10))), len(plain))
        self.turn(unbegun=self.claimed.runs)
        self.assertEqual(len(self.traced(lambda: self.claim(free=10, **order))),
                         len(plain))
        self.assertEqual(len(plain), 6)     # pragma, begin, what stands, rows, mark, commit

    def test_successes_of_schedules_cost_other_runs_no_statement(self):
        self.enqueue(count=3)
        for count in (1, 2):
            runs = self.claim(free=count)
            found = self.traced(lambda: self.turn(outcomes=[
                Outcome(run, pybgworker.SUCCESS, result="1") for run in runs]))
            self.assertFalse([s for s in found if "bg_schedule" in s])

    def test_ten_thousand_queues_cost_a_claim_no_more_than_one(self):
        self.fill(10_000)
        one = self.steps(lambda: self.claim(free=50))
        pages = self.pages(lambda: self.claim(free=1))
        self.sql("delete from bg_task")
        self.fill(10_000, "'q' || i")
        self.assertLess(self.steps(lambda: self.claim(free=50)), 2 * one)
        self.assertLessEqual(self.pages(lambda: self.claim(free=1)), pages)
        self.assertLess(len(self.traced(lambda: self.claim(free=50))), 14)

    def test_no_look_costs_more_for_what_it_cannot_take(self):
        for queue, name in (("'q' || i", "'t'"), ("'q' || i", "'unknown'"),
                            ("'q' || i", "'unknown' || i"), ("'q'", "'unknown' || i")):
            self.sql("delete from bg_task")
            self.fill(10_000, queue, name)
            self.sql("insert or ignore into bg_queue (name, paused_at) "
                     "select queue, 0 from bg_task")
            for order in ({}, {"t": 1.0, "u": 1.0}, {"queues": ("a", "q7", "z")}):
                def look(found, order=order):
                    return self.store.peek(self.order(round=found, **order), self.now)

                found = pybgworker.Round()
                for _ in range(3):
                    with self.subTest(queue=queue, name=name, order=order):
                        traced = self.traced(lambda f=found: look(f))
                        self.assertLess(len(traced), 2 * pybgworker._SEEK_STEPS + 20)
                        self.assertLess(self.steps(lambda f=found: look(f)), 60_000)
                    found = look(found)[1].round

    def test_a_limited_name_is_asked_for_once_in_a_round(self):
        names = [f"n{i:04}" for i in range(1, 2001)]
        self.fill(2000, name="printf('n%04d', i)")
        self.sql("insert into bg_rate select name, ? from bg_task", self.now + 3_600_000)
        self.enqueue("u", priority=9)
        rates = dict.fromkeys(names, 1 / 3600)
        for queues in (None, ("default", "other")):
            found, cost, worst = pybgworker.Round(), 0, 0
            while not (found.is_over and cost):
                order = self.order(queues=queues, names=(*names, "u"), round=found, **rates)
                looked = []
                traced = self.traced(
                    lambda o=order: looked.extend(self.store.peek(o, self.now)))
                found, cost = looked[1].round, cost + len(traced)
                worst = max(worst, len(traced))
            with self.subTest(queues=queues):
                self.assertEqual(looked[0], True)
                self.assertEqual(len(found.limited), 2000)
                self.assertLess(worst, 4 * pybgworker._SEEK_STEPS)
                self.assertLess(cost, 3 * 2000)

    def test_names_without_number_are_passed_in_one_look(self):
        self.fill(20_000, name="'s' || i")
        self.fill(20_000, name="'unknown' || i")
        mine = self.enqueue("u", priority=9)
        self.assertEqual([run.id for run in self.claim()], [mine])

    def test_a_worker_of_few_queues_looks_at_no_others(self):
        self.fill(10_000, "'q' || i")
        mine = self.enqueue("u", "q77x")
        traced = self.traced(lambda: self.claim(queues=("q77x", "q78x")))
        self.assertEqual([run.id for run in self.claimed.runs], [mine])
        self.assertLess(len(traced), 20)

    def test_a_turn_takes_few_statements(self):
        self.enqueue(count=100)
        statements = self.traced(lambda: self.claim(free=50))
        self.assertLess(len(statements), 50 + 14)

    def pages(self, act):
        before = self.store.db.wal_bytes()
        act()
        return (self.store.db.wal_bytes() - before) / (4096 + 24)

    def test_pages_written_by_an_operation_stay_within_their_budget(self):
        self.enqueue(count=200)         # no checkpoint: the log must not start anew
        runs = []
        enqueue = self.pages(self.enqueue)
        claim = self.pages(lambda: runs.extend(self.claim(free=1)))
        runs += self.claim(free=8)      # a row that grows may have its page split
        finish = sorted(
            self.pages(lambda: self.finish(run, result="1")) for run in runs)[4]
        self.assertGreater(min(enqueue, claim, finish), 0)
        self.assertLessEqual(enqueue, 3)
        self.assertLessEqual(claim, 4)
        self.assertLessEqual(finish, 3)

    def test_a_hundred_at_a_time_write_few_pages(self):
        self.enqueue(count=400)
        runs = []
        self.assertLess(self.pages(lambda: runs.extend(self.claim(free=100))), 25)
        outcomes = [Outcome(run, pybgworker.SUCCESS, "1") for run in runs]
        self.assertLess(self.pages(lambda: self.turn(outcomes=outcomes)), 25)


    def test_history_costs_a_turn_a_statement_for_each_group_and_few_pages(self):
        self.enqueue(count=200)
        self.enqueue("u", count=200)
        self.claim(free=400)
        runs = iter(sorted(self.claimed.runs, key=lambda run: run.id % 200))

        def turn(**parts):
            outcomes = [Outcome(next(runs), 4, "1", duration=0.1, started_at=self.now)
                        for _ in range(20)]
            self.turn(outcomes=outcomes, **parts)

        turn(history=pybgworker.RunCounts())        # the rows of this minute are new
        plain = self.traced(turn)
        self.assertFalse([text for text in plain if "bg_history" in text])
        counted = self.traced(lambda: turn(history=pybgworker.RunCounts()))
        self.assertEqual(len(counted), len(plain) + 1 + 2)      # t and u
        alone = self.pages(lambda: self.turn(history=counts_of(queue="default")))
        self.assertLessEqual(alone, 2)
        self.assertGreater(alone, 0)

    def test_what_nobody_ran_costs_no_statement_of_history(self):
        self.enqueue(count=4)
        counts = pybgworker.RunCounts()
        found = self.traced(lambda: (
            self.turn(history=counts, order=self.order(free=1)),
            self.turn(history=counts, unbegun=self.claim(free=1)),
            self.store.reap(2, "w", self.now)))
        self.assertFalse([text for text in found if "bg_history" in text])


class ManyWorkers(QueueCase):
    """Rows of thousands of workers that died with their machine."""

    def setUp(self):
        super().setUp()
        add_workers(self.store, *range(10, 5010))
        self.sql("update bg_worker set port = 9, host = 'elsewhere', beat_at = id")

    def test_few_are_sent_a_hint_and_those_that_beat_last(self):
        self.sql("update bg_worker set beat_at = 9000 where id = 77")
        sent = []
        with mock.patch.object(pybgworker, "send_wake_ups", sent.extend):
            self.enqueue()
        self.assertLessEqual(len(sent), 32)
        connection = self.store.db.link().connection
        plan = self.sql("explain query plan select port, token from bg_worker "
                        "where port > 0 order by beat_at desc limit 32")
        self.assertIn("bg_beat", plan[0][-1])
        self.sql("update bg_worker set token = 'alive' where id = 77")
        self.assertEqual(pybgworker.wake_addresses(connection)[0], (9, "alive"))

    def test_they_are_reaped_a_bounded_number_at_a_time(self):
        watching = pybgworker.Liveness(self.store, self.app.settings,
                                       mock.Mock(port=0, token=""))
        watching.register(self.now)
        watching._is_dead = lambda row: True
        self.enqueue(count=30)
        for worker in range(4000, 4030):
            self.claim(worker=worker, free=1)
        looks, lost = 0, []
        while looks == 0 or watching.is_behind:
            looks += 1
            before = self.store.db.link().commits
            found = watching.reap_dead(self.now)
            self.assertLessEqual(len(found), 10)
            self.assertLessEqual(self.store.db.link().commits - before, 11)
            lost += found
        self.assertEqual(len(lost), 30)
        self.assertLess(looks, 40)
        self.assertEqual([w.id for w in self.store.workers()], [watching.id])


class Faults(QueueCase):
    """An error at the n-th statement: all or nothing, and the store works after."""

    class Failing:
        """A connection that fails once, at its n-th statement."""

        def __init__(self, connection, n):
            self.real, self.left = connection, n

        def __getattr__(self, name):
            return getattr(self.real, name)

        def _count(self):
            self.left -= 1
            if self.left == 0:
                raise sqlite3.OperationalError("disk I/O error")

        def execute(self, *args):
            if "rollback" not in args[0]:
                self._count()
            return self.real.execute(*args)

        def executemany(self, *args):
            self._count()
            return self.real.executemany(*args)

    VERBS = {
        "enqueue": lambda s: s.enqueue(count=3),
        "enqueue large": lambda s: s.enqueue(args='["' + "x" * 3000 + '"]'),
        "claim": lambda s: s.claim(free=2, t=5),
        "finish": lambda s: s.finish(s.runs[0], result='"' + "x" * 3000 + '"'),
        "retry": lambda s: s.store.retry(1, s.now),
        "cancel": lambda s: s.store.cancel(5, s.now),
        "forget": lambda s: s.store.forget(1),
        "purge": lambda s: s.store.purge(None, None, s.now),
        "prune": lambda s: s.store.prune(0, s.now + 1, s.now + 1, 10),
        "reap": lambda s: s.store.reap(1, "w", s.now),
        "pause": lambda s: s.store.pause("q", s.now),
        "count": lambda s: s.turn(history=s.counts, outcomes=[Outcome(s.runs[0], 4, "1")]),
        "roll up": lambda s: s.store.roll_up(s.now + 10_000_000),
    }

    def snapshot(self):
        tables = ("bg_task", "bg_payload", "bg_worker", "bg_rate", "bg_queue", "bg_meta",
                  "bg_history")
        return [self.sql(f"select * from {table} order by 1") for table in tables]

    def prepare(self):
        self.setUp()
        self.enqueue(count=8)
        self.runs = self.claim(free=3)
        self.finish(self.runs[2], result='"' + "y" * 3000 + '"')
        self.sql("update bg_task set state = 4, finished_at = 1 where id = 1")
        self.runs = [run for run in self.runs if run.id == 2]
        self.counts = counts_of()
        with self.store.db.write() as link:
            pybgworker.add_history(link.connection, self.counts, self.now)

    def test_every_verb_is_all_or_nothing(self):
        for name, verb in self.VERBS.items():
            for n in range(1, 40):
                self.prepare()
                before = self.snapshot()
                link = self.store.db.link()
                link.connection = failing = self.Failing(link.connection, n)
                try:
                    verb(self)
                except pybgworker.DatabaseUnavailable:
                    link.connection = failing.real
                    with self.subTest(f"{name}, statement {n}"):
                        self.assertEqual(self.snapshot(), before)
                        verb(self)
                        self.assertNotEqual(self.snapshot(), before)
                else:
                    link.connection = failing.real
                    self.assertGreater(n, 2, name)
                    break


# == Timetable ================================================================

class Firsts(Case):

    def is_first(self, what="x", ms=1000):
        return self.store.is_first(what, ms, self.now)

    def test_it_is_so_once_in_a_while_for_each_thing(self):
        self.app.store.create()
        self.assertEqual([self.is_first(), self.is_first(), self.is_first("y")],
                         [True, False, True])
        self.now += 999
        self.assertFalse(self.is_first())
        self.now += 1
        self.assertTrue(self.is_first())
        self.assertEqual(len(self.sql("select * from bg_rate")), 1)     # not those of y

    def test_a_rate_of_the_same_name_is_left_alone(self):
        self.app.store.create()
        self.sql("insert into bg_rate values ('x', 1), ('on:first', 2), ('on:zzz', 3)")
        self.is_first(ms=1)
        self.now += 5
        self.is_first("y")
        self.assertEqual(self.sql("select name from bg_rate where tat < 4 order by 1"),
                         [("on:first",), ("on:zzz",), ("x",)])


# == Facts ====================================================================


class Facts(QueueCase):

    def test_what_tells_why_is_of_one_moment(self):
        """Another connection commits between two statements of it."""
        self.enqueue()
        link, read, counts = self.store.db.link(), self.store.db.read, []

        def reading(statement, *parameters):
            if "bg_worker_task" in statement:
                self.sql("update bg_task set attempt = attempt + 1")
            counts.append(read("select attempt from bg_task where id = 1")[0][0])
            return read(statement, *parameters)

        self.store.db.read = reading
        self.addCleanup(vars(self.store.db).pop, "read", None)
        facts = self.store.task_facts(1, self.now)
        self.assertEqual((facts.task.attempt, set(counts[1:])), (0, {0}))
        self.assertFalse(link.connection.in_transaction)
        self.assertEqual(read("select attempt from bg_task where id = 1"), [(1,)])


# == Register =================================================================


class Registering(QueueCase):

    def test_the_sizes_are_those_of_the_files_and_what_is_free_in_one(self):
        self.fill(20_000)
        self.store.db.checkpoint()
        full = self.store.sizes()
        self.assertEqual(full.main, self.db.stat().st_size)
        self.assertEqual(full.wal, Path(f"{self.db}-wal").stat().st_size)
        self.assertLess(full.free, full.main // 10)
        self.sql("delete from bg_task")
        empty = self.store.sizes()
        self.assertEqual(empty.main, full.main)
        self.assertGreater(empty.free, full.main // 2)


# == Registry =================================================================


class Registries(Case):

    def test_a_catalog_says_of_an_app_what_a_worker_needs(self):
        tasks = self.module("""
            RATE_LIMIT = "5/s"
            configure(queues=["a", "b"], timeout=9)

            def wrong(task_id, error): pass

            @task(queue="q", priority=2, retries=7, retry_delay=2, timeout=5,
                  rate_limit="10/s", retry_for=(OSError,), on_failure=wrong)
            async def first(a, b=1, *rest, c, **more): pass

            @cron("*/5 * * * *", tz="UTC", misfire="all", jitter=3)
            @task
            def second(): pass
        """)
        with mock.patch.dict(os.environ, PYBGWORKER_CONCURRENCY="3"):
            registry = pybgworker.Registry.of(tasks.task.__self__, "tasks")
        found = pybgworker.Registry.read(json.loads(json.dumps(registry.catalog())))

        self.assertEqual(found, registry)
        first = found.tasks["tasks.first"]
        self.assertEqual(first.parameters, ("a", "b", "*rest", "c", "**more"))
        self.assertEqual((first.queue, first.priority, first.timeout, first.rate_limit),
                         ("q", 2, 5, 10))
        self.assertEqual((*first.policy[:2],), (7, 2))
        self.assertEqual((first.callbacks, first.is_async), (2, True))
        self.assertIn("tasks.first:on_failure", found.tasks)
        second = found.tasks["tasks.second"]
        self.assertEqual(second.schedules, (("*/5 * * * *", "UTC", "all", "allow", 3),))
        self.assertEqual((second.is_async, second.max_running), (False, 0))
        settings = found.settings({"timeout": 4})
        self.assertEqual((settings.queues, settings.timeout, settings.concurrency),
                         (("a", "b"), 4, 3))

    def test_parameters_are_named_as_in_the_definition(self):
        class Thing:
            def method(self, a): pass

        for fn, names in (
            (lambda: 0, ()), (lambda x, *y, z=1, **w: 0, ("x", "*y", "z", "**w")),
            (Thing().method, ("a",)), (print, ()),
        ):
            self.assertEqual(pybgworker.parameters_of(fn), names)


# == Processes ================================================================


class Processes(Case):

    def test_signals_and_exit_codes_have_names(self):
        self.assertEqual(pybgworker.signal_name(11), "SIGSEGV")
        self.assertEqual(pybgworker.signal_name(250), "signal 250")
        for code, expected in (("3", (None, 3)), ("-9", ("SIGKILL", None))):
            argv = [sys.executable, "-c", f"import os\nos.kill(os.getpid(), 9) "
                    f"if {code} < 0 else os._exit({code})"]
            null = os.open(os.devnull, os.O_RDWR)
            pid = pybgworker.spawn(argv, [], null, null)
            os.close(null)
            found = until(lambda pid=pid: pybgworker.poll_exit(pid))
            self.assertEqual((found.signal, found.code), expected)

    def test_a_process_that_cannot_start_leaves_no_descriptor(self):
        def refuse(*_):
            raise BlockingIOError(pybgworker.errno.EAGAIN, "no process to be had")

        real = pybgworker.spawn
        self.addCleanup(setattr, pybgworker, "spawn", real)
        pybgworker.spawn = refuse
        nursery = pybgworker.Nursery("tasks")

        def lowest_free():
            fd = os.dup(0)
            os.close(fd)
            return fd

        before = lowest_free()
        for _ in range(3):
            self.assertRaises(BlockingIOError, nursery.start, 0.0)
        nursery.spec = pybgworker.child_spec("tasks", "db", self.app.settings)
        nursery.bear = refuse
        for _ in range(3):
            self.assertRaises(BlockingIOError, pybgworker.Member, nursery, nursery.spec,
                              None, 0.0)
        self.assertEqual(lowest_free(), before)

        pybgworker.spawn = real                     # and one that cannot be watched
        selector = pybgworker.selectors.DefaultSelector()
        before = lowest_free()
        nursery.bear = lambda *_: mock.Mock(end=lambda _: ended.append(1))
        ended = []
        member = pybgworker.Member(nursery, nursery.spec, None, 0.0)
        selector.register(member.pipe.fd, pybgworker.selectors.EVENT_READ)

        class Full:
            unregister = selector.unregister

            def register(self, *_):
                raise OSError(pybgworker.errno.ENOSPC, "no more")

        self.assertRaises(OSError, member.watch, Full())
        self.assertEqual(ended, [1])
        self.assertEqual(lowest_free(), before)
        selector.close()

    def test_of_many_stacks_the_one_that_crashed_is_first_and_idle_ones_are_left_out(self):
        own = pybgworker.__file__
        idle = f'Thread 0x01 (most recent call first):\n  File "{own}", line 7 in wait\n' \
            '  File "/usr/lib/python3/threading.py", line 982 in run'
        at_work = 'Thread 0x02 (most recent call first):\n  File "/app.py", line 1 in work\n' \
            f'  File "{own}", line 9 in serve'
        crashed = at_work.replace("Thread 0x02", "Current thread 0x03")
        asked = idle.replace("Thread 0x01", "Current thread 0x04")
        fatal, modules = "Fatal Python error: Segmentation fault", "Extension modules: _x"
        for written, expected in (
            ((fatal, idle, at_work, crashed, idle, modules),
             (fatal, crashed, at_work, modules)),
            ((fatal, at_work, asked), (fatal, asked, at_work)),     # it was killed by hand
            ((idle, at_work, asked), (at_work,)),                   # at a time limit
            ((idle, asked), (idle, asked)),             # better than nothing
            ((), ()),
        ):
            with contextlib.ExitStack() as undo:
                reader, writer = pybgworker.stack_pipe(undo, undo)
                os.write(writer, "\n\n".join(written).encode())
                text = "\n\n".join(expected)
                self.assertEqual(pybgworker.read_stacks(reader, 9999), text)
                os.write(writer, text.encode())
                self.assertEqual(pybgworker.read_stacks(reader, 50), text[:50])


# == Memory ===================================================================


class Scarce(Case):
    """What the system says of want of memory, where it does."""

    def cgroup(self, path, own="4:memory:/a/b", **files):
        """An OomKills that sees these files in a folder of its own."""
        for name, text in files.items():
            file = self.folder / path / name.replace("__", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (self.folder / "own").write_text(f"11:cpu,cpuacct:/x\nodd\n{own}\n")
        (self.folder / "vmstat").write_text("pgfree 7\noom_kill 40\n")
        return pybgworker.OomKills(str(self.folder / "root"), str(self.folder / "own"),
                                   str(self.folder / "vmstat"))

    def test_kills_are_counted_where_we_are(self):
        """In either version, also if a container has its own cgroup at the top."""
        first = {"memory__oom_control": "oom_kill_disable 0\noom_kill 3\n",
                 "memory__stat": "rss 1\nhierarchical_memory_limit 5000\n"}
        second = {"memory__events": "oom 9\noom_kill 3\n", "memory__max": "5000\n"}
        for path, own, files in (
            ("root/memory/a/b", "4:memory:/a/b", first),
            ("root/memory", "4:hugetlb,memory:/docker/1234", first),
            ("root/a/b", "0::/a/b", second), ("root", "0::/", second),
        ):
            shutil.rmtree(self.folder / "root", ignore_errors=True)
            kills = self.cgroup(path, own, **files)
            with self.subTest(path):
                self.assertEqual(kills.evidence(), ("cgroup", 0, 5000))
                name = next(iter(files)).replace("__", ".")
                (self.folder / path / name).write_text("oom_kill 5\n")
                self.assertEqual(kills.evidence(), ("cgroup", 2, 5000))

    def test_a_kill_explains_one_death_and_not_one_that_comes_later(self):
        kills = self.cgroup("root/a/b", "0::/a/b", memory__events="oom_kill 3")
        events = self.folder / "root/a/b/memory.events"
        events.write_text("oom_kill 5")
        self.assertEqual([kills.evidence().kills for _ in range(3)], [2, 1, 0])
        events.write_text("oom_kill 6")
        kills.look()                        # it may be said a moment later
        self.assertEqual([kills.evidence().kills for _ in range(2)], [1, 0])
        events.write_text("oom_kill 7")
        kills.look()
        kills.look()
        self.assertEqual(kills.evidence().kills, 0)

    def test_the_least_limit_above_us_holds(self):
        kills = self.cgroup("root/a/b", "0::/a/b", memory__events="oom_kill 0",
                            memory__max="max")
        for path, text, least in (("a", "9000", 9000), ("a/b", "7000", 7000),
                                  ("a/b", "nonsense", 9000)):
            (self.folder / "root" / path / "memory.max").write_text(text)
            self.assertEqual(kills.evidence().limit, least)

    def test_without_a_cgroup_those_of_the_machine_are_counted(self):
        kills = self.cgroup("root/else", "4:memory:/a/b", x="")
        self.assertEqual(kills.evidence(), ("machine", 0, None))
        (self.folder / "vmstat").write_text("oom_kill 41\n")
        self.assertEqual(kills.evidence(), ("machine", 1, None))

    def test_nothing_is_known_where_nothing_is_said(self):
        kills = pybgworker.OomKills("no", "no", "no")
        kills.look()
        self.assertEqual(kills.evidence(), ("", 0, None))
        (self.folder / "own").write_bytes(b"\xff:memory:/\xff\n")
        kills = pybgworker.OomKills(str(self.folder), str(self.folder / "own"), "no")
        self.assertEqual(kills.evidence(), ("", 0, None))

    def test_a_counter_that_goes_back_or_away_is_no_kill(self):
        kills = self.cgroup("root/a/b", "0::/a/b", memory__events="oom_kill 3")
        events = self.folder / "root/a/b/memory.events"
        events.write_text("oom_kill 1")
        self.assertEqual(kills.evidence().kills, 0)
        events.unlink()                     # the machine counts, from now on
        self.assertEqual(kills.evidence(), ("machine", 0, None))
        events.write_text("oom_kill 9")
        self.assertEqual(kills.evidence(), ("cgroup", 0, None))


# == Wire =====================================================================


class Wires(unittest.TestCase):

    def test_a_frame_that_was_cut_is_recalled(self):
        """By its id: arguments that somebody has edited may end within a character."""
        with contextlib.ExitStack() as undo:
            end = pybgworker.WorkerEnd(undo)
            for name in ("n", "nn"):
                run = pybgworker.Run(7, name, "q", 0, 3, 0, None, 0, None, "\u00e9" * 40000, 5)
                end.send(run)
            self.assertEqual(end.recall(), {7})

    def test_a_frame_says_all_that_a_child_must_know_of_a_run(self):
        for name, timeout, tick, args in (
            ("t", None, None, None), ("mod.t", 0.5, 0, "[[1],{}]"),
            ("\u00fcnic\u00f6de\U0001f40d", 3600, 1_700_000_100, "[[],{}]"),
        ):
            run = Run((1 << 63) - 1, name, "q", 2, 3, 0, timeout, 0, tick, args, 5)
            self.assertEqual(
                pybgworker.read_frame(pybgworker.write_frame(run)),
                (run.id, 3, timeout or 0, tick, pybgworker.NO_CELL, name, args or ""))
            self.assertEqual(
                pybgworker.read_frame(pybgworker.write_frame(run, 70_000))[4:6],
                (70_000, name))

    def test_what_a_child_says_arrives_and_nonsense_is_refused(self):
        said = ((pybgworker.READY, ["a"]), (pybgworker.BROKEN, "trace \ud800"),
                (pybgworker.SUCCEEDED, "[1]"), (pybgworker.ENDED_BADLY, {"kind": "abort"}),
                (pybgworker.PRINTED, "\u00fc\n"), (pybgworker.PROGRESSED, [5, None]),
                (pybgworker.SKIPPED, 7),
                (pybgworker.WRITTEN, b"\xff"), (pybgworker.STRAYS, True),
                (pybgworker.UNKNOWN, b""), (pybgworker.LACKING, "memory"),
                (pybgworker.LAGGED, [1.5, "stack"]), (pybgworker.SPENT, "why"))
        self.assertEqual({kind.code for kind, _ in said}, set(pybgworker._KINDS))
        with contextlib.ExitStack() as ends:
            wire = pybgworker.WorkerEnd(ends)
            frames, messages = map(os.dup, wire.theirs()[:2])
            child = pybgworker.ChildEnd(frames, messages)
            ends.callback(child.close)
            for kind, value in said:
                child.send(pybgworker.write_message(kind, value, (7, 2), 1000, 0.5))
            self.assertTrue(wire.read())
            heard = list(wire.heard(1000))
            self.assertEqual([kind for kind, *_ in heard], [kind for kind, _ in said])
            self.assertEqual({of for _, of, *_ in heard}, {(7, 2)})
            self.assertEqual([value for _, _, value, *_ in heard[2:]],
                             [value for _, value in said[2:]])
            for code, started_at, duration, length in (
                (b"?", 1, 0.5, 0), (b"S", 1 << 60, 0.5, 0), (b"S", 1, float("nan"), 0),
                (b"S", 1, -1.0, 0), (b"S", 1, 0.5, 1 << 30),
            ):
                wire._buffer[:] = pybgworker._MESSAGE.pack(length, code, 7, 2, started_at,
                                                           duration)
                with self.subTest(code):
                    self.assertRaises(ValueError, list, wire.heard(1000))


# == Begun ====================================================================


class Beginning(Case):

    def setUp(self):
        super().setUp()
        self.path = self.store.path
        self.begun = pybgworker.Begun()
        self.addCleanup(self.begun.remove)

    def open(self, most=8):
        self.begun.open(self.path, 7, most)
        if self.begun.fd < 0:
            self.skipTest("no cells on this file system")
        return Path(f"{self.path}-begun-7")

    def run_of(self, number, attempt=1):
        return Run(number, "t", "q", attempt - 1, 0, 0, None, 0, None, "", 5)

    def read(self):
        return pybgworker.read_begun(self.path, 7)

    def test_what_is_marked_had_begun_and_nothing_else(self):
        runs = [self.run_of(1), self.run_of(2), self.run_of(10**15, 3)]
        self.open()
        cells = [self.begun.give(run) for run in runs]
        marks = pybgworker.Marks(os.dup(self.begun.fd))
        for run, cell in list(zip(runs, cells))[1:]:
            marks.mark(cell, run.id, run.attempt)
        marks.leave()
        self.begun.close()
        is_over, begun = self.read()
        self.assertTrue(is_over)
        for of, had_begun in (((1, 1), False), ((2, 1), True), ((2, 2), False),
                              ((10**15, 3), True), ((10**15, 1), False), ((3, 1), False)):
            self.assertEqual(of in begun, had_begun, of)

    def test_an_attempt_of_any_number_that_is_marked_had_begun(self):
        self.open()
        marks = pybgworker.Marks(os.dup(self.begun.fd))
        for attempt in (1, 16_383, 16_384, 20_000, 10**9):
            marks.mark(0, 5, attempt)
            with mock.patch.object(pybgworker.fcntl, "flock"):
                self.assertIn((5, attempt), self.read()[1])
        marks.leave()

    def test_a_cell_is_of_one_run_until_that_is_committed(self):
        self.open(3)
        runs = [self.run_of(number) for number in range(1, 6)]
        given = [self.begun.give(run) for run in runs]
        self.assertEqual(given, [0, 1, 2, None, None])
        self.assertEqual(self.begun.give(runs[1]), 1)       # recalled, and sent again
        self.begun.take([runs[1], runs[4], runs[1]])
        self.assertEqual([self.begun.give(run) for run in runs[3:]], [1, None])

    def test_cells_are_read_when_all_are_dead(self):
        """Whoever has the mapping only, and is stopped, may still begin what it took."""
        self.open()
        code = """
            import os, signal, sys, pybgworker
            marks = pybgworker.Marks(int(sys.argv[1]))
            if sys.argv[2] != "overlay":
                os.closerange(3, 100)
            print("mapped", flush=True)
            sys.stdin.read(1)
            marks.mark(0, 4, 1)
            print("marked", flush=True)
            sys.stdin.read()
        """
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(self.begun.fd),
             pybgworker.file_system(self.path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean_environment(),
            pass_fds=[self.begun.fd], bufsize=0)
        self.addCleanup(child.communicate)
        self.addCleanup(child.kill)
        self.assertEqual(child.stdout.readline(), b"mapped\n")
        self.assertEqual(self.read(), (False, None))        # our own descriptor
        self.begun.close()
        self.assertEqual(self.read(), (False, None))
        child.stdin.write(b"x")
        self.assertEqual(child.stdout.readline(), b"marked\n")
        child.send_signal(signal.SIGSTOP)
        self.assertEqual(self.read(), (False, None))
        child.kill()
        is_over, begun = until(lambda: self.read() if self.read()[0] else None, 2)
        self.assertIn((4, 1), begun)
        self.assertNotIn((5, 1), begun)

    def test_a_process_that_was_forked_by_a_task_may_outlive_all(self):
        self.open()
        marks = pybgworker.Marks(os.dup(self.begun.fd))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            self.begun.close()
            marks.leave()
            marks.leave()
            os.write(writer, b"x")
            time.sleep(1000)
        self.addCleanup(os.waitpid, pid, 0)
        self.addCleanup(os.kill, pid, signal.SIGKILL)
        os.read(reader, 1)
        for fd in (reader, writer):
            os.close(fd)
        marks.mark(2, 9, 1)
        marks.leave()
        self.begun.close()
        is_over, begun = self.read()
        self.assertTrue(is_over and (9, 1) in begun)

    def test_where_nobody_can_tell_all_had_begun(self):
        path = self.open()
        self.begun.close()
        whole = path.read_bytes()
        self.assertEqual(self.read(), (True, {0}))
        for what, content in (
            ("nothing", b""), ("too short", whole[:63]), ("half a cell", whole[:-3]),
            ("another boot", whole[:20] + b"\0\0\0" + whole[23:]),
            ("another version", b"X" + whole[1:]),
        ):
            path.write_bytes(content)
            self.assertEqual(self.read(), (True, None), what)
        path.write_bytes(whole)
        with mock.patch.object(pybgworker, "boot_id", return_value=""):
            self.assertEqual(self.read(), (True, None))
        path.rename(self.folder / "away")
        self.assertEqual(self.read(), (True, None))
        path.symlink_to(self.folder / "away")
        self.assertEqual(self.read(), (True, None))
        path.unlink()
        os.link(self.folder / "away", path)
        self.assertEqual(self.read(), (True, None))
        path.unlink()
        os.mkfifo(path)
        self.assertEqual(self.read(), (True, None))

    def test_who_lacks_a_descriptor_to_read_them_asks_again(self):
        self.open()
        with mock.patch.object(pybgworker.os, "open",
                               side_effect=OSError(errno.EMFILE, "too many")):
            self.assertEqual(self.read(), (False, None))

    def test_where_there_can_be_no_cells_there_are_none_and_nothing_is_left(self):
        def fail(*_):
            raise OSError(errno.ENOSPC, "no space")

        fds = len(os.listdir("/dev/fd"))
        for target, name, instead in (
            (pybgworker.os, "posix_fallocate", fail), (pybgworker.os, "pwrite", fail),
            (pybgworker.fcntl, "flock", fail), (pybgworker.os, "open", fail),
            (pybgworker, "boot_id", lambda: ""),
            (pybgworker, "file_system", lambda path: "btrfs"),
            (pybgworker, "file_system", lambda path: ""),
        ):
            with mock.patch.object(target, name, instead), self.subTest(name):
                self.begun.open(self.path, 7, 8)
                self.assertEqual(self.begun.fd, -1)
                self.assertEqual(self.begun.give(self.run_of(1)), pybgworker.NO_CELL)
                self.begun.take([self.run_of(1)])
            self.assertEqual(list(self.folder.glob("*-begun-*")), [])
        self.assertEqual(len(os.listdir("/dev/fd")), fds)

    def test_the_file_is_made_anew_for_those_who_may_write_the_database(self):
        for plant in (lambda p: p.symlink_to(self.db), lambda p: os.mkfifo(p),
                      lambda p: p.write_text("of somebody")):
            plant(Path(f"{self.path}-begun-7"))
            os.chmod(self.db, 0o664)
            path = self.open()
            found = os.lstat(path)
            self.assertEqual((found.st_mode & 0o777, found.st_size), (0o660, 64 + 8 * 8))
            self.assertGreaterEqual(found.st_blocks * 512, found.st_size)   # no holes
            self.begun.remove()
            self.assertFalse(path.exists())

    def test_who_leaves_does_not_take_along_what_another_has_put_there(self):
        path = self.open()
        path.unlink()
        path.write_text("of another database, which has taken the place of ours")
        self.begun.remove()
        self.assertTrue(path.exists())

    def test_without_cells_nothing_is_marked(self):
        marks = pybgworker.Marks(-1)
        marks.mark(pybgworker.NO_CELL, 1, 1)
        marks.leave()


# == Output ===================================================================

PRINTING = """
    import io, os, subprocess, sys, threading, time
    sys.stdout.reconfigure(encoding="latin-1", errors="replace", line_buffering=True)
    sys.stderr = io.TextIOWrapper(sys.stderr.detach(), encoding="utf-8", newline="\\n")
    print("at import")

    @task(retries=0)
    def in_threads(threads, lines):
        def work(n):
            for i in range(lines):
                print("line", n, i)
        all = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        [t.start() for t in all], [t.join() for t in all]

    @task(retries=0)
    def forms():
        print("text")
        print("to stderr", file=sys.stderr, flush=True)
        print("original", file=sys.__stdout__)
        sys.stdout.buffer.write(b"bytes \\xc3")
        sys.stdout.buffer.write(b"\\xa4\\n")
        wrapped = io.TextIOWrapper(sys.stdout.buffer, "utf-8")
        print("wrapped", file=wrapped)
        del wrapped
        sys.stdout.close()
        sys.stdout.writelines(["after ", "close\\n"])
        print("tail", end="")

    @task(retries=0)
    def in_pieces():
        for piece in (b"one \\xe2", b"\\x82\\xac", b" euro\\ntw", b"o\\nthree"):
            os.write(1, piece)
            time.sleep(0.02)

    @task(retries=0)
    def raw(n):
        os.write(1, b"raw %d\\n" % n)

    @task(retries=0)
    def leave_behind():
        subprocess.Popen(["sh", "-c",
                          "while ! [ -e go ]; do sleep 0.01; done; echo late; exec sleep 60"])

    @task(retries=0)
    def let_go():
        open("go", "w").close()
        while not os.path.exists("heard"):
            time.sleep(0.01)

    @task(retries=0)
    def from_handlers():
        class Loud:
            def __del__(self):
                print("finalized")
        import signal
        signal.signal(signal.SIGVTALRM, lambda *_: print("handled"))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0005, 0.0005)
        for i in range(3000):
            loud = Loud()
            loud.me = loud          # for the collector to find
            print("line", i)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    @task(retries=0)
    def in_forks():
        print("begun", end=" ")
        if os.fork() == 0:
            print("forked")
            sys.stdout.flush()
            os._exit(0)
        os.wait()
        print("ended")
"""


class Outputs(Served):

    def setUp(self):
        super().setUp()
        (self.folder / "printing.py").write_text(   # not to be imported here
            "from pybgworker import *\n" + textwrap.dedent(PRINTING))

    def printed(self, name, *args):
        """Run a task; return the lines of its output, as its row has them."""
        result = self.app.send(f"printing.{name}", *args, retries=0)
        result.get(timeout=20)
        return (self.store.output(result.id) or "").splitlines()

    def test_lines_of_many_threads_stay_whole(self):
        self.worker("--concurrency", 1, app="printing")
        lines = self.printed("in_threads", 32, 100)

        self.assertEqual(sorted(lines), sorted(
            f"line {n} {i}" for n in range(32) for i in range(100)))

    def test_a_stream_takes_whatever_an_app_does_to_one(self):
        worker = self.worker("--concurrency", 1, app="printing")

        self.assertEqual(self.printed("forms"), [
            "text", "to stderr", "original", "bytes \u00e4", "wrapped", "after close", "tail"])
        self.assertEqual(self.printed("raw", 1), ["raw 1"])
        for event in worker.all("output", text="at import"):
            self.assertNotIn("task_id", event)
        self.assertGreater(len(worker.all("output", text="at import")), 0)

    def test_a_stream_has_all_that_a_text_stream_has(self):
        stream = pybgworker.TaskStream(lambda *_: None, 1)
        plain = __import__("io").TextIOWrapper(__import__("io").BytesIO())
        public = {n for n in dir(plain) if n[0] != "_"}

        self.assertIsInstance(stream, __import__("io").TextIOBase)
        self.assertEqual(public - set(dir(stream)), set())
        self.assertRaises(OSError, stream.read)
        self.assertRaises(TypeError, stream.write, b"bytes")
        self.assertRaises(LookupError, stream.reconfigure, encoding="no such")

    def test_a_stream_sends_whole_lines(self):
        got = []
        stream = pybgworker.TaskStream(lambda text, *_: got.append(text), 1)
        for text in ("a", "b\nc", "\n\nd"):
            stream.write(text)
        stream.flush()

        self.assertEqual(got, ["ab\n", "c\n\n", "d"])

    def test_output_is_cut_at_its_limit_and_says_so(self):
        cut, limit = pybgworker.cut_output, pybgworker.OUTPUT_CHARS
        self.assertEqual(cut("abc", 0), "abc")
        self.assertEqual(cut("abc", limit - 3), "abc")
        self.assertEqual(cut("abc", limit), pybgworker._CUT_MARK)
        self.assertEqual(cut("abc", limit - 1), "a" + pybgworker._CUT_MARK)
        self.assertEqual(cut("abc", limit + 1), "")

    def test_bytes_in_pieces_become_whole_lines_of_whole_characters(self):
        worker = self.worker("--concurrency", 1, app="printing")

        self.assertEqual(self.printed("in_pieces"), ["one \u20ac euro", "two", "three"])
        worker.wait_for("task_success")
        texts = [e["text"] for e in worker.all("output", name="printing.in_pieces")]
        self.assertEqual(texts, ["one \u20ac euro", "two", "three"])

    def test_an_endless_line_is_cut_between_characters(self):
        cutter, text = pybgworker.LineCutter(), ""
        data = "\u20ac".encode() * 50_000
        for at in range(0, len(data), 1000):
            text += cutter.cut(data[at:at + 1000])
            self.assertLessEqual(len(cutter.rest), pybgworker.LINE_BYTES)
        self.assertEqual(text + cutter.cut(b"", at_end=True), "\u20ac" * 50_000)

    def test_what_a_run_has_not_flushed_is_its_own(self):
        """In wrappers that the app or a task has made, and in the middle of a line."""
        (self.folder / "wrapping.py").write_text(textwrap.dedent("""
            import codecs, io, os, sys
            from pybgworker import task
            if os.environ["HOW"] == "wrap":
                sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding="utf-8")
                sys.stderr = open(2, "w", closefd=False)
            else:
                sys.stdout = open(1, "w", closefd=False)
            kept = []

            @task(name="say", retries=0)
            def say(n):
                print("said", n)
                print("error", n, file=sys.stderr)

            @task(name="bytes", retries=0)
            def bytes(n):
                sys.stdout.buffer.write(b"part %d" % n)
                sys.__stdout__.buffer.write(b" of a line")

            @task(name="own", retries=0)
            def own(n):
                kept.append(sys.stdout)
                sys.stdout = codecs.getwriter("utf-8")(io.BufferedWriter(
                    io.FileIO(1, "w", closefd=False)))
                print("own", n)
                kept.append(sys.stdout)
                del sys.stderr

            @task(name="hang", retries=0)
            def hang():
                reader, writer = os.pipe()
                sys.stdout = open(writer, "w", buffering=1 << 20)
                kept.append(sys.stdout)
                sys.stdout.write("x" * 500_000)
                return "done"
            """))
        send = pybgworker.default_app.send
        for how in ("wrap", "open"):
            worker = self.worker("--concurrency", 1, app="wrapping", HOW=how)
            results = [(n, name, send(name, n, retries=0)) for n in range(2)
                       for name in ("say", "bytes", "own")]
            for n, name, result in results:
                self.get(result)
                with self.subTest(how, name=name, n=n):
                    text = (self.store.output(result.id) or "").replace("\n", "")
                    self.assertIn(text, {
                        "say": (f"error {n}said {n}", f"said {n}error {n}"),
                        "bytes": (f"part {n} of a line", f" of a linepart {n}"),
                        "own": (f"own {n}",),
                    }[name])
            self.assertEqual(self.get(send("hang", retries=0)), "done")
            worker.stop()

    def test_what_c_code_writes_is_booked_on_the_run_that_wrote_it(self):
        """Also when the next run follows at once, out of the pipe."""
        (self.folder / "many.py").write_text(
            "import os\nfrom pybgworker import task\n@task\ndef raw(n):\n"
            "    os.write(1, b'raw %d\\n' % n)\n")
        for n in range(300):
            self.app.send("many.raw", n)
        self.worker("--concurrency", 1, "--burst", app="many").wait()

        rows = [self.store.output(id) for id in range(1, 301)]
        self.assertEqual(rows, [f"raw {n}\n" for n in range(300)])

    def test_a_late_line_of_a_process_is_not_booked_on_the_next_run(self):
        worker = self.worker("--concurrency", 1, app="printing")
        self.printed("leave_behind")
        result = self.app.send("printing.let_go", retries=0)
        late = worker.wait_for("output", text="late")
        (self.folder / "heard").write_text("")
        self.get(result)

        self.assertNotIn("task_id", late)
        self.assertEqual(self.store.output(result.id) or "", "")

    def test_only_a_process_that_holds_the_pipe_makes_a_line_nobodys(self):
        """Not one whose output goes elsewhere; and only from the next run on."""
        (self.folder / "holders.py").write_text(textwrap.dedent("""
            import os, subprocess
            from pybgworker import task
            elsewhere = subprocess.Popen(["sleep", "30"], stdout=subprocess.DEVNULL,
                                         stderr=subprocess.DEVNULL)

            @task(name="echo", retries=0)
            def echo():
                subprocess.run(["echo", "from a program"])

            @task(name="start", retries=0)
            def start():
                held = subprocess.Popen(["sleep", "30"])
                os.write(1, b"first\\nno end")
                return held.pid
            """))
        send = pybgworker.default_app.send
        self.worker("--concurrency", 1, app="holders")
        for name in ("echo", "echo", "start"):
            self.get(send(name, retries=0))
        if Path("/proc/self/task").exists():
            self.assertEqual([self.store.output(n) for n in (1, 2)],
                             ["from a program\n"] * 2)
        self.assertEqual(self.store.output(3), "first\nno end")

    @unittest.skipUnless(Path("/proc/self/task").exists(), "needs /proc")
    def test_the_helpers_of_multiprocessing_make_no_line_nobodys(self):
        """The resource tracker and the forkserver stay; what that starts may write."""
        (self.folder / "helped.py").write_text(textwrap.dedent("""
            import multiprocessing, os, subprocess, time
            from pybgworker import task

            def say(text, until=None):
                while until and not os.path.exists(until):
                    time.sleep(0.01)
                print(text, flush=True)

            @task(name="process", retries=0)
            def process(method, until=None):
                context = multiprocessing.get_context(method)
                one = context.Process(target=say, args=(f"by {method}", until))
                one.start()
                if not until:
                    one.join()
                return os.getpid()

            @task(name="echo", retries=0)
            def echo(until=None):
                subprocess.run(["echo", "from a program"])
                if until:
                    open(until, "w").close()
                    while not os.path.exists("heard"):
                        time.sleep(0.01)
                return os.getpid()
            """))
        send = pybgworker.default_app.send
        worker = self.worker("--concurrency", 1, app="helped")
        for method in ("spawn", "forkserver", "spawn"):
            pids = 1, 2
            while len(set(pids)) > 1:           # the first run may be the spare's
                result = send("process", method, retries=0)
                after = send("echo", retries=0)
                pids = self.get(result), self.get(after)
            self.assertEqual(self.store.output(result.id), f"by {method}\n")
            with self.subTest(method):
                self.assertEqual(self.store.output(after.id), "from a program\n")
        self.get(send("process", "forkserver", "go", retries=0))
        result = send("echo", "go", retries=0)
        late = until(lambda: next(
            (e for e in worker.all("output") if "by forkserver" in e["text"]
             and "task_id" not in e), None))
        (self.folder / "heard").touch()
        self.assertEqual(self.get(result), pids[0])
        self.assertTrue(late)

    def test_a_print_in_the_middle_of_a_print_arrives(self):
        self.worker("--concurrency", 1, app="printing")
        lines = self.printed("from_handlers")

        text = "\n".join([*lines, ""])
        self.assertIn("handled\n", text)
        while re.search("(handled|finalized)\n", text):     # also one within another
            text = re.sub("(handled|finalized)\n", "", text)
        self.assertEqual(text, "".join(f"line {i}\n" for i in range(3000)))

    def test_a_forked_process_does_not_print_what_its_parent_began(self):
        self.worker("--concurrency", 1, app="printing")

        self.assertEqual(sorted(self.printed("in_forks")), ["begun ended", "forked"])


# == Log lines ================================================================

SAYING = """
    def say():
        import logging
        log = logging.getLogger("shop")
        for level in ("debug", "info", "warning"):
            getattr(log, level)("%s said", level)

    @task(retries=0, name="plain")
    def plain():
        say()

    @task(retries=0, name="in_root")
    def in_root():
        import logging
        logging.info("by the module")

    @task(retries=0, name="configured")
    def configured():
        import logging, sys
        logging.basicConfig(format="mine %(message)s", stream=sys.stdout, level="DEBUG")
        say()

    @task(retries=0, name="added")
    def added():
        import logging, sys
        handler = logging.StreamHandler(sys.stdout)
        logging.getLogger().addHandler(handler)
        say()
"""


class LogLines(Served):
    LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} %s\n"

    def said(self, name, *flags, before="", **environment):
        """What a task prints in a worker of its own; `before` is in its app."""
        (self.folder / "saying.py").write_text(
            f"from pybgworker import *\n{before}\n" + textwrap.dedent(SAYING))
        worker = self.worker("--concurrency", 1, *flags, app="saying", **environment)
        result = self.app.send(name, retries=0)
        self.get(result, 60)
        worker.stop()
        return self.store.output(result.id) or ""

    def test_log_lines_are_output_from_their_level_on(self):
        info = self.LINE % "INFO shop info said"
        warning = self.LINE % "WARNING shop warning said"
        for flags, environment, lines in (
            ((), {}, info + warning),
            (("--start-method", "spawn"), {}, info + warning),
            (("--log-level", "debug"), {},
             self.LINE % "DEBUG shop debug said" + info + warning),
            ((), {"PYBGWORKER_LOG_LEVEL": "warning"}, warning),
            ((), {"PYBGWORKER_LOG_LEVEL": "critical"}, ""),
        ):
            with self.subTest(flags, **environment):
                self.assertRegex(self.said("plain", *flags, **environment), f"^{lines}$")
        self.assertRegex(self.said("in_root"), "^" + self.LINE % "INFO root by the module")

    def test_who_has_configured_logging_is_left_alone(self):
        """When the app is imported, or by a task: each line comes once, as he wants."""
        mine, bare = "mine debug said\nmine info said\nmine warning said\n", \
            "info said\nwarning said\n"
        for name, before, text in (
            ("plain", "import logging, sys; logging.basicConfig(stream=sys.stdout, "
             "level='DEBUG', format='mine %(message)s')", mine),
            ("plain", "import logging; logging.getLogger().addHandler("
             "logging.NullHandler())", ""),
            ("configured", "", mine), ("added", "", bare),
        ):
            with self.subTest(name, before=before):
                self.assertEqual(self.said(name, before=before), text)

    def test_a_level_that_the_app_has_set_stays(self):
        before = "import logging; logging.getLogger().setLevel('DEBUG')"
        text = self.said("plain", "--log-level", "error", before=before)
        self.assertEqual(len(text.splitlines()), 3, text)

    def test_a_time_limit_that_falls_into_a_log_line_is_kept(self):
        done = self.python("""
            import logging, pybgworker
            pybgworker.take_log_lines("INFO")

            class Late:
                def __init__(self, exc): self.exc = exc
                def __str__(self): raise self.exc

            for exc in (pybgworker.TaskTimeout("late"), pybgworker.TaskCancelled("late")):
                try:
                    logging.getLogger().info("%s", Late(exc))
                except type(exc):
                    print("kept")
            logging.getLogger().info("%s", Late(ValueError("of no use")))
            logging.getLogger().info("goes on")
            """)
        self.assertEqual(done.stdout, "kept\n" * 2)
        self.assertIn("of no use", done.stderr)
        self.assertRegex(done.stderr, "INFO root goes on\n$")

    def test_a_log_level_is_one_of_five_words(self):
        for value in ("info", "Debug", "WARNING", "error", "CRITICAL"):
            self.assertEqual(pybgworker.check_setting("log_level", value, "x"),
                             value.upper())
        for value in ("", "5", 10, None, "notset", "warn"):
            with self.assertRaisesRegex(pybgworker.SettingError, "debug, info, warning"):
                pybgworker.check_setting("log_level", value, "x")


# == Threads ==================================================================

IN_THREADS = """
    import asyncio, multiprocessing, os, subprocess, sys, threading, time

    def wait_for(path):
        while not os.path.exists(path):
            time.sleep(0.002)

    @task(name="meet")
    def meet(count):
        print("begun", end=" ")
        open(f"met-{current_task().id}", "w").close()
        while sum(name[:4] == "met-" for name in os.listdir(".")) < count:
            time.sleep(0.002)
        print("ended")
        return current_task().id

    @task(name="chatter")
    def chatter():
        while True:
            print("x" * 100)

    @task(name="hold")
    def hold(path="go"):
        wait_for(path)

    @task(name="number")
    def number():
        return os.getpid()
"""


class InThreads(Case):
    """Ordinary tasks in threads of one child."""

    def child(self, source="", threads=4, **options):
        return OneChild(self, textwrap.dedent(IN_THREADS) + textwrap.dedent(source),
                        threads, **options)

    def test_as_many_as_there_are_threads_run_at_a_time(self):
        child = self.child(threads=4)
        ids = [child.run("meet", 4) for _ in range(4)]

        self.assertEqual([child.answer(number) for number in ids], ids)
        for number in ids:
            self.assertEqual(child.printed(number), "begun ended\n")

    def test_no_thread_takes_a_second_frame_before_it_has_answered(self):
        child = self.child("""
            @task(name="mark")
            def mark():
                open(f"met-{current_task().id}", "w").close()
                wait_for("go")
            """, threads=2)
        ids = [child.run("mark") for _ in range(3)]
        until(lambda: len(list(self.folder.glob("met-*"))) == 2)

        self.assertEqual(child.wire.recall(), {ids[2]})
        (self.folder / "go").touch()
        self.assertEqual([child.answer(number) for number in ids[:2]], [None] * 2)

    def test_a_time_limit_raises_in_its_thread_only(self):
        child = self.child("""
            @task(name="late")
            def late():
                try:
                    while True:
                        time.sleep(0.001)
                except TaskTimeout:
                    print("cleaned up")
                    raise
            """)
        neighbour = child.run("hold")
        began = time.monotonic()
        error = child.answer(child.run("late", timeout=0.2))

        self.assertLess(0.2, time.monotonic() - began)
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual((error["kind"], error["type"], error["message"]), (
            "timeout", "TaskTimeout", "the time limit is reached"))
        self.assertIn("in late", error["traceback"])
        self.assertEqual(child.printed(2), "cleaned up\n")
        (self.folder / "go").touch()
        self.assertIsNone(child.answer(neighbour))

    def test_a_later_run_may_have_the_earlier_limit(self):
        child = self.child()
        first = child.run("chatter", timeout=0.6)
        then = child.run("chatter", timeout=0.1)
        self.assertEqual(child.answer(then)["kind"], "timeout")
        self.assertEqual(child.said(pybgworker.ENDED_BADLY, first), [])
        self.assertEqual(child.answer(first)["kind"], "timeout")

    def test_a_cancelled_run_ends_at_once_and_no_other(self):
        child = self.child()
        ids = [child.run("chatter") for _ in range(3)]
        until(lambda: all(map(child.printed, ids)))
        child.cancel(ids[1])
        error = child.answer(ids[1], timeout=4)

        self.assertEqual((error["kind"], error["type"]), ("cancelled", "TaskCancelled"))
        self.assertIn(f"task {ids[1]} is being cancelled", error["message"])
        self.assertEqual(child.said(pybgworker.ENDED_BADLY, ids[0]), [])
        for number in (ids[0], ids[2]):
            child.cancel(number)
            child.answer(number, timeout=4)

    def test_a_cancellation_may_come_before_its_run(self):
        """What comes after it is for no later attempt."""
        child = self.child(threads=2)
        holding = [child.run("hold") for _ in range(2)]
        early = child.run("chatter")            # there is no thread for it yet
        child.cancel(early)
        (self.folder / "go").touch()
        self.assertEqual(child.answer(early, timeout=5)["kind"], "cancelled")
        child.cancel(holding[0])
        self.assertIsNone(child.answer(holding[0]))
        other = child.run("chatter")
        child.cancel(other)
        child.answer(other, timeout=5)          # so it has heard of both
        child.sent = holding[0] - 1             # the same id
        (self.folder / "go").unlink()
        child.heard.clear()
        again = child.run("hold")
        child.answer(child.run("number"))
        self.assertEqual(child.said(pybgworker.ENDED_BADLY, again), [])
        child.cancel(again)
        self.assertEqual(child.answer(again, timeout=5)["kind"], "cancelled")

    def test_an_interruption_falls_nowhere_but_into_the_task(self):
        """Whenever it comes: in a print, a fork, a finalizer, or just at the end."""
        child = self.child("""
            @task(name="busy")
            def busy(how, seconds):
                class Final:
                    def __del__(self):
                        for _ in range(30):
                            pass
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    if how == "print":
                        print("whole")
                    elif how == "fork":
                        pid = os.fork()
                        if not pid:
                            os._exit(0)
                        os.waitpid(pid, 0)
                    elif how == "finalizer":
                        Final()
            """, threads=8)
        chance, waiting, answers = random.Random(3), [], []
        for n in range(300):
            how = ("print", "fork", "finalizer", "nothing")[n % 4]
            limit = 0.003 + chance.uniform(-0.002, 0.002)
            waiting.append(child.run("busy", how, 0.003, timeout=limit))
            if len(waiting) > 30:
                answers.append(child.answer(waiting.pop(0)))
        answers += map(child.answer, waiting)
        kinds = {answer and (answer["kind"], answer["message"]) for answer in answers}

        self.assertEqual(kinds, {None, ("timeout", "the time limit is reached")})
        printed = "".join(child.said(pybgworker.PRINTED)).splitlines()
        self.assertEqual([line for line in printed if line.replace("whole", "")], [])
        self.assertEqual(child.output.read(), b"")
        (self.folder / "met-0").touch()
        ids = [child.run("meet", 8) for _ in range(7)]      # and all threads live
        self.assertEqual([child.answer(number) for number in ids], ids)
        self.assertEqual(child.stop().code, 0)

    class Barb:
        """In the place of a lock: what is set as it is released is on its way then."""

        def __enter__(self):
            pass

        def __exit__(self, *_):
            pybgworker._setter()(threading.get_ident(), pybgworker.TaskTimeout)

    def test_what_was_set_before_a_shelter_is_raised_at_its_entrance(self):
        aim, run = pybgworker.Aim(), types.SimpleNamespace(timeout=0, raised=None)
        aim.open(run)
        aim._lock = self.Barb()
        self.assertRaises(pybgworker.TaskTimeout, aim.shelter)

    def test_what_falls_into_a_shelter_is_raised_behind_it(self):
        aim, run = pybgworker.Aim(), types.SimpleNamespace(timeout=0, raised=None)
        exc, later = pybgworker.TaskTimeout("why"), pybgworker.TaskCancelled("later")
        aim.open(run)
        aim.shelter()
        aim.interrupt(run, exc)
        aim.interrupt(run, later)               # a run gets only one
        pybgworker._settle()
        aim.unshelter(False)                    # of a shelter within
        with self.assertRaises(pybgworker.TaskTimeout) as caught:
            aim.unshelter(True)
        self.assertIs(caught.exception, exc)
        aim.close(run)

    def test_what_comes_at_the_end_of_a_run_is_dropped(self):
        aim, run = pybgworker.Aim(), types.SimpleNamespace(timeout=0, raised=None)
        aim.open(run)
        run.raised = pybgworker.TaskTimeout("late")
        aim._lock = self.Barb()
        aim.close(run)                          # raises nothing, here or behind it
        pybgworker._settle()
        self.assertIsNone(run.raised)
        aim._lock = threading.Lock()
        aim.interrupt(run, pybgworker.TaskTimeout("too late"))
        pybgworker._settle()
        self.assertIsNone(run.raised)

    def test_a_message_is_sent_in_a_shelter(self):
        """Else it could be cut, or the wire be taken to be in use for ever."""
        sent, aim = [], pybgworker.Aim()
        run = types.SimpleNamespace(timeout=0, raised=None)

        def send(message):
            aim.interrupt(run, pybgworker.TaskTimeout("why"))
            pybgworker._settle()
            sent.append(message)

        runs, interrupts = types.SimpleNamespace(), types.SimpleNamespace(others=[])
        threads = pybgworker.Threads(
            runs, types.SimpleNamespace(send=send), interrupts, 2)
        threads._aims[aim.ident] = aim
        aim.open(run)
        with self.assertRaisesRegex(pybgworker.TaskTimeout, "why"):
            runs.send(b"message")
        self.assertEqual(sent, [b"message"])
        aim.close(run)
        runs.send(b"answer")
        self.assertEqual(sent, [b"message", b"answer"])

    def test_what_the_interpreter_drops_is_raised_again(self):
        """In a finalizer, or a hook at a fork."""
        child = self.child("""
            class Endless:
                def __del__(self):
                    while True:
                        pass

            @task(name="finalize")
            def finalize():
                Endless()
                chatter()

            fall_in = []

            def hook():
                while fall_in:
                    pass

            os.register_at_fork(before=hook)

            @task(name="fork")
            def fork():
                fall_in.append(1)
                if not os.fork():
                    os._exit(0)
                while True:
                    time.sleep(0.001)
            """)
        for name in ("finalize", "fork"):
            error = child.answer(child.run(name, timeout=0.1), timeout=5)
            self.assertEqual((error["kind"], error["message"]),
                             ("timeout", "the time limit is reached"), name)
        self.assertEqual(child.output.read(), b"")

    def test_a_thread_that_a_task_starts_is_not_interrupted_for_it(self):
        """Before Python 3.12 it was, now and then, and its maker waited for ever."""
        child = self.child("""
            @task(name="start")
            def start(seconds):
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    thread = threading.Thread(target=time.sleep, args=(0,))
                    thread.start()
                    thread.join()
            """, threads=8)
        chance, waiting, answers = random.Random(5), [], []
        for _ in range(300):
            limit = 0.003 + chance.uniform(-0.002, 0.002)
            waiting.append(child.run("start", 0.003, timeout=limit))
            if len(waiting) > 30:
                answers.append(child.answer(waiting.pop(0)))
        answers += map(child.answer, waiting)
        self.assertEqual({answer and answer["kind"] for answer in answers},
                         {None, "timeout"})
        self.assertEqual(child.said(pybgworker.PRINTED), [])

    def test_exits_and_errors_cost_the_run_and_not_the_thread(self):
        child = self.child("""
            @task(name="end")
            def end(how):
                if how == "result":
                    return object()
                raise {"exit": SystemExit, "key": KeyboardInterrupt, "value": ValueError,
                       "abort": Abort}[how]("why")
            """, threads=2)
        for how, kind, type in (
            ("exit", "exception", "SystemExit"), ("key", "exception", "KeyboardInterrupt"),
            ("value", "exception", "ValueError"), ("abort", "abort", "Abort"),
            ("result", "exception", "PayloadTypeError"),
        ) * 2:
            error = child.answer(child.run("end", how))
            self.assertEqual((error["kind"], error["type"]), (kind, type))
        self.assertEqual(child.answer(child.run("unknown")), b"")
        self.assertEqual(child.answer(child.run("number")), child.pid)

    def test_a_task_may_start_processes_of_all_sorts(self):
        child = self.child("""
            from concurrent.futures import ProcessPoolExecutor

            def double(n):
                print("doubled")
                return n * 2

            async def ask():
                process = await asyncio.create_subprocess_exec("true")
                return await process.wait()

            @task(name="start")
            def start(how):
                if how == "fork":
                    pid = os.fork()
                    if not pid:
                        return "never answered"
                    return os.waitpid(pid, 0)[1]
                if how == "exit":
                    pid = os.fork()
                    if not pid:
                        sys.exit(3)
                    return os.waitpid(pid, 0)[1] >> 8
                if how == "subprocess":
                    return subprocess.run(["true"]).returncode
                if how == "asyncio":
                    return asyncio.run(ask())
                if how == "coroutine":
                    return ask()
                context = multiprocessing.get_context(how.split()[0])
                if "pool" in how:
                    with ProcessPoolExecutor(1, mp_context=context) as pool:
                        return pool.submit(double, 21).result() - 42
                process = context.Process(target=double, args=(1,))
                process.start()
                process.join()
                return process.exitcode
            """)
        held = child.run("hold")
        for how in ("fork", "exit", "subprocess", "asyncio", "coroutine", "fork process",
                    "spawn process", "forkserver process", "fork pool", "spawn pool"):
            with self.subTest(how):
                number = child.run("start", how)
                self.assertEqual(child.answer(number), 3 if how == "exit" else 0,
                                 (child.printed(number), child.said(pybgworker.WRITTEN)))
        (self.folder / "go").touch()
        self.assertIsNone(child.answer(held))
        self.assertEqual(child.stop().code, 0)

    def test_threads_that_print_and_fork_do_not_hang(self):
        child = self.child("""
            @task(name="both")
            def both(n):
                for i in range(10):
                    print("line", n, i)
                    sys.stdout.buffer.write(b"bytes\\n")
                    pid = os.fork()
                    if not pid:
                        print("forked", n)
                        sys.stdout.buffer.write(b"forked bytes\\n")
                        os._exit(0)
                    os.waitpid(pid, 0)
            """, threads=16)
        ids = [child.run("both", n) for n in range(32)]
        for n, number in enumerate(ids):
            self.assertIsNone(child.answer(number, timeout=30))
            self.assertEqual(child.printed(number),
                             "".join(f"line {n} {i}\nbytes\n" for i in range(10)))

    def test_a_thread_that_a_task_starts_is_its_own(self):
        child = self.child("""
            @task(name="parent")
            def parent(n):
                ids = []

                def work():
                    ids.append(current_task().id)
                    print("part", n, end="!")
                    current_task().set_progress(n)

                threads = [threading.Thread(target=work) for _ in range(3)]
                [thread.start() for thread in threads]
                [thread.join() for thread in threads]
                return ids

            @task(name="leave")
            def leave():
                def late():
                    wait_for("go")
                    print("late")
                    current_task().set_progress(99)
                    open("went", "w").close()
                threading.Thread(target=late).start()
            """)
        held = child.run("hold", "done")
        for n in range(1, 4):
            number = child.run("parent", n)
            self.assertEqual(child.answer(number), [number] * 3)
            self.assertEqual(child.printed(number), f"part {n}!" * 3)
            self.assertEqual(child.said(pybgworker.PROGRESSED, number), [[n, None]] * 3)
        left = child.run("leave")
        self.assertIsNone(child.answer(left))
        (self.folder / "go").touch()
        until(lambda: (self.folder / "went").exists())
        until(lambda: "late\n" in child.printed(0))
        self.assertEqual(child.printed(left) + child.printed(held), "")
        self.assertEqual(child.said(pybgworker.PROGRESSED, left), [])

    def test_a_pool_that_a_module_keeps_works_for_whoever_asks_it(self):
        """Also where one task runs at a time; and who came first keeps none of it."""
        source = """
            from concurrent.futures import ThreadPoolExecutor
            pools = []

            def work(n):
                print("work", n, end="!")
                current_task().set_progress(n)
                return current_task().id

            @task(name="ask")
            def ask(n, lingers=False):
                if not pools:
                    pools.append(ThreadPoolExecutor(2))
                if lingers:
                    pools[0].submit(linger)
                return list(pools[0].map(work, [n] * 3))

            def linger():
                wait_for("go")
                print("late")
                open("went", "w").close()
            """
        for threads in (1, 4):
            child = self.child(source, threads=threads)
            for n in (1, 2, 3):
                number = child.run("ask", n, n == 2)
                self.assertEqual(child.answer(number), [number] * 3)
                self.assertEqual(child.printed(number), f"work {n}!" * 3)
                self.assertEqual(child.said(pybgworker.PROGRESSED, number),
                                 [[n, None]] * 3)
            (self.folder / "go").touch()
            until(lambda: (self.folder / "went").exists())
            until(lambda: child.printed(0) == "late\n")
            for name in ("go", "went"):
                (self.folder / name).unlink()

    def test_bytes_of_c_code_are_of_a_run_only_when_it_is_alone(self):
        child = self.child("""
            @task(name="raw")
            def raw():
                os.write(1, b"raw\\n")
            """)
        alone = child.run("raw")
        child.answer(alone)
        held = child.run("hold")
        child.answer(child.run("raw"))
        self.assertEqual(
            [(number, value) for kind, number, value in child.heard
             if kind is pybgworker.WRITTEN], [(alone, b"raw\n"), (0, b"raw\n")])
        (self.folder / "go").touch()
        child.answer(held)

    def test_nothing_is_put_back_under_a_neighbour(self):
        child = self.child("""
            @task(name="spoil")
            def spoil(until):
                os.environ["SPOILT"] = "yes"
                os.mkdir("deep"), os.chdir("deep"), os.umask(0o077)
                sys.setrecursionlimit(5000)
                wait_for(until)
                return os.environ.get("SPOILT"), os.path.basename(os.getcwd())

            @task(name="look")
            def look():
                return (os.environ.get("SPOILT"), os.path.basename(os.getcwd()),
                        sys.getrecursionlimit())
            """)
        before = child.answer(child.run("look"))
        spoilt = child.run("spoil", str(self.folder / "go"))
        until(lambda: (self.folder / "deep").exists())
        until(lambda: list(child.answer(child.run("look"))) == ["yes", "deep", 5000])
        (self.folder / "go").touch()
        self.assertEqual(list(child.answer(spoilt)), ["yes", "deep"])
        self.assertEqual(child.answer(child.run("look")), before)

    def test_a_stop_waits_for_all_and_runs_the_exit_handlers(self):
        child = self.child("""
            import atexit
            atexit.register(lambda: print("bye", flush=True))
            """)
        held = child.run("hold")
        child.answer(child.run("number"))
        child.wire.hang_up()
        (self.folder / "go").touch()
        self.assertIsNone(child.answer(held))
        self.assertEqual(child.stop().code, 0)
        self.assertEqual(child.printed(0), "bye\n")


# == Coroutines ===============================================================

ON_THE_LOOP = """
    import asyncio, contextvars, multiprocessing, os, subprocess, sys, threading, time

    @task(name="wait")
    async def wait(seconds):
        await asyncio.sleep(seconds)

    @task(name="hold")
    async def hold(path="go"):
        print("begun", end=" ")
        open(f"held-{current_task().id}", "w").close()
        while not os.path.exists(path):
            await asyncio.sleep(0.005)
        print("ended")
        return current_task().id

    @task(name="number")
    async def number():
        return os.getpid()

    @task(name="ordinary")
    def ordinary():
        return "ordinary"

    @task(name="busy")
    def busy():
        print("busy")
        while True:
            time.sleep(0.001)
"""


class OnTheLoop(Case):
    """Tasks that are coroutines, on the event loop of one child."""

    policy = ""             # a line that chooses the loop
    changes = ["factory", "end", "executor", "others"]      # that can be undone

    def child(self, source="", coroutines=100, **options):
        source = textwrap.dedent(ON_THE_LOOP) + self.policy + textwrap.dedent(source)
        return OneChild(self, source, coroutines=coroutines, **options)

    def test_a_thousand_wait_at_a_time_in_little_memory(self):
        child = self.child(coroutines=1000)
        began = time.monotonic()
        ids = [child.beside("wait", 1) for _ in range(1000)]
        for number in ids:
            self.assertIsNone(child.answer(number))
        self.assertLess(time.monotonic() - began, 4)
        self.assertLess(pybgworker.memory_bytes(child.pid), 80 << 20)
        self.assertEqual(child.stop().code, 0)

    def test_a_thousand_print_each_its_own_lines(self):
        child = self.child("""
            @task(name="say")
            async def say(n):
                for i in range(3):
                    print("part", n, end=" ")
                    sys.stdout.buffer.write(b"bytes ")
                    await asyncio.sleep(0.001)
                    print("end", i)
            """, coroutines=1000)
        ids = [child.beside("say", n) for n in range(1000)]
        for n, number in enumerate(ids):
            self.assertIsNone(child.answer(number, timeout=60))
            self.assertEqual(sorted(child.printed(number).split()), sorted(
                f"part {n} bytes end 0 part {n} bytes end 1 part {n} bytes end 2".split()))

    def computed(self, child):
        """Seconds of CPU."""
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @unittest.skipUnless(Path("/proc/self/stat").exists(), "needs /proc")
    def test_no_more_are_taken_than_there_are_places(self):
        child = self.child(coroutines=3)
        ids = [child.beside("hold") for _ in range(5)]
        until(lambda: len(list(self.folder.glob("held-*"))) == 3)
        before = self.computed(child)
        time.sleep(0.3)                     # what waits there does not keep it busy
        self.assertLess(self.computed(child) - before, 0.1)
        self.assertEqual(child.wire.recall(), set(ids[3:]))
        (self.folder / "go").touch()
        self.assertEqual([child.answer(number) for number in ids[:3]], ids[:3])
        then = [child.beside("hold") for _ in range(5)]
        self.assertEqual([child.answer(number) for number in then], then)

    def test_a_time_limit_cancels_it_at_its_await(self):
        child = self.child("""
            @task(name="late")
            async def late():
                try:
                    await asyncio.sleep(60)
                finally:
                    await asyncio.sleep(0.01)
                    print("cleaned up")

            @task(name="stubborn")
            async def stubborn():
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    return "swallowed"

            @task(name="other")
            async def other():
                try:
                    await asyncio.sleep(60)
                finally:
                    raise ValueError("on the way")
            """)
        neighbour = child.beside("hold")
        number = child.beside("late", timeout=0.1)
        error = child.answer(number, timeout=4)
        self.assertEqual((error["kind"], error["type"], error["message"]), (
            "timeout", "TaskTimeout", "the time limit is reached"))
        self.assertIn("in late", error["traceback"])
        self.assertTrue(error["retryable"])
        self.assertEqual(child.printed(number), "cleaned up\n")
        self.assertEqual(child.answer(child.beside("stubborn", timeout=0.05)), "swallowed")
        error = child.answer(child.beside("other", timeout=0.05))
        self.assertEqual((error["kind"], error["type"]), ("timeout", "ValueError"))
        (self.folder / "go").touch()
        self.assertEqual(child.answer(neighbour), neighbour)

    def test_a_cancelled_run_ends_at_once_and_no_other(self):
        child = self.child()
        ids = [child.beside("wait", 60) for _ in range(3)]
        child.answer(child.beside("number"))
        for place in ("idle", "busy"):          # of the main thread
            if place == "busy":
                held = child.run("busy")
                until(lambda: child.printed(held))
            number = ids.pop()
            child.cancel(number)
            error = child.answer(number, timeout=4)
            self.assertEqual((error["kind"], error["type"]), ("cancelled", "TaskCancelled"))
            self.assertEqual(child.said(pybgworker.ENDED_BADLY, ids[0]), [])
        child.cancel(held)
        self.assertEqual(child.answer(held, timeout=4)["kind"], "cancelled")

    def test_one_is_cancelled_while_the_main_thread_hears_nothing(self):
        child = self.child("""
            import hashlib

            @task(name="deaf")
            def deaf():
                print("deaf")
                for _ in range(1000):
                    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)
            """)
        held, number = child.run("deaf"), child.beside("wait", 60)
        until(lambda: child.printed(held))
        child.cancel(number)
        self.assertEqual(child.answer(number, timeout=5)["kind"], "cancelled")
        self.assertEqual(child.said(pybgworker.ENDED_BADLY, held), [])

    def test_a_cancellation_before_the_first_step_is_one(self):
        child = self.child("""
            @task(name="block")
            async def block():
                open("blocks", "w").close()
                while not os.path.exists("go"):
                    time.sleep(0.005)
            """)
        first = child.beside("block")
        until(lambda: (self.folder / "blocks").exists())
        number = child.beside("wait", 60)
        child.cancel(number)
        (self.folder / "go").touch()
        self.assertIsNone(child.answer(first))
        self.assertEqual(child.answer(number, timeout=5)["kind"], "cancelled")

    def test_what_it_has_started_ends_with_it(self):
        child = self.child("""
            kept = []

            async def waits():
                try:
                    await asyncio.sleep(60)
                finally:
                    print("task ended")

            async def generates():
                try:
                    yield 1
                finally:
                    await asyncio.sleep(0)
                    print("generator closed")

            async def breeds():
                asyncio.ensure_future(waits())
                await asyncio.sleep(0)

            async def stays():
                while not os.path.exists("go"):
                    try:
                        await asyncio.sleep(0.01)
                    except asyncio.CancelledError:
                        pass
                print("late")

            @task(name="leave")
            async def leave(fails):
                kept.append(asyncio.ensure_future(waits()))
                asyncio.ensure_future(breeds())
                kept.append(generates())
                await kept[-1].__anext__()
                await asyncio.sleep(0.01)
                if fails:
                    raise ValueError

            @task(name="leave_stubborn")
            async def leave_stubborn():
                kept.append(asyncio.ensure_future(stays()))
                await asyncio.sleep(0)

            @task(name="count")
            async def count():
                return len(asyncio.all_tasks())
            """)
        neighbour = child.beside("hold", "never")
        for fails in (False, True):
            number = child.beside("leave", fails)
            child.answer(number, timeout=4)
            self.assertEqual(sorted(child.printed(number).splitlines()),
                             ["generator closed", "task ended", "task ended"])
        self.assertEqual(child.answer(child.beside("count")), 2)
        number = child.beside("leave_stubborn")
        self.assertIsNone(child.answer(number, timeout=5))
        (self.folder / "go").touch()
        until(lambda: child.printed(0) == "late\n")
        self.assertEqual(child.printed(number), "")
        self.assertEqual(child.said(pybgworker.SUCCEEDED, neighbour), [])

    def test_a_cancellation_may_come_before_the_loop(self):
        """Which is made for the first run; or before there is a thread for one."""
        child = self.child("""
            class Policy(asyncio.DefaultEventLoopPolicy):
                def new_event_loop(self):
                    while not os.path.exists("loop"):
                        time.sleep(0.005)
                    return super().new_event_loop()

            asyncio.set_event_loop_policy(Policy())
            """)
        number = child.beside("wait", 60)
        child.cancel(number)
        self.assertEqual(child.answer(child.run("ordinary")), "ordinary")
        (self.folder / "loop").touch()
        self.assertEqual(child.answer(number, timeout=5)["kind"], "cancelled")
        child = self.child("""
            import pybgworker
            make = pybgworker.Threads.__init__

            def make_slowly(*args):
                time.sleep(0.2)
                make(*args)

            pybgworker.Threads.__init__ = make_slowly
            """, threads=2)
        number = child.run("busy")
        child.cancel(number)
        self.assertEqual(child.answer(number, timeout=5)["kind"], "cancelled")

    def test_what_does_not_end_is_said_to_the_worker(self):
        """Once; and it keeps no neighbour from anything, nor its own run from its end."""
        child = self.child("""
            @task(name="stubborn")
            async def stubborn():
                me = asyncio.current_task()
                async def holds_on():
                    while True:
                        try:
                            await asyncio.sleep(60)
                        except asyncio.CancelledError:
                            me.cancel()         # so is the one who waits for us
                asyncio.ensure_future(holds_on())
                await asyncio.sleep(0)

            @task(name="stuck")
            async def stuck(forgets):
                call = asyncio.get_running_loop().run_in_executor(None, until_go)
                await asyncio.sleep(0) if forgets else await call

            @task(name="call")
            async def call():
                return await asyncio.get_running_loop().run_in_executor(None, len, "ab")

            def until_go():
                while not os.path.exists("go"):
                    time.sleep(0.01)
            """)
        number = child.beside("stubborn")
        self.assertIsNone(child.answer(number, timeout=5))
        said = "a run of stubborn has left asyncio tasks that do not end when they are " \
            "cancelled"
        self.assertEqual(child.said(pybgworker.SPENT, number), [said])
        numbers = [child.beside("stuck", True) for _ in range(40)]
        numbers += [child.beside("stuck", False, timeout=0.3) for _ in range(40)]
        for number in numbers:
            child.answer(number, timeout=5)
        for _ in range(10):
            self.assertEqual(child.answer(child.beside("call")), 2)
        self.assertEqual(len(child.said(pybgworker.SPENT)), 1)
        (self.folder / "go").touch()

    def test_a_call_in_a_thread_that_ends_soon_is_waited_for(self):
        child = self.child("""
            @task(name="forget")
            async def forget(seconds):
                def print_later():
                    time.sleep(seconds)
                    print("done")
                asyncio.get_running_loop().run_in_executor(None, print_later)
            """)
        number = child.beside("forget", 0.1)
        child.answer(number)
        self.assertEqual(child.printed(number), "done\n")
        self.assertEqual(child.said(pybgworker.SPENT), [])
        number = child.beside("forget", 1.3)
        child.answer(number)
        self.assertEqual(child.said(pybgworker.SPENT, number), [
            "a run of forget has left calls in threads that do not end"])

    def test_no_run_can_cancel_what_is_of_another(self):
        child = self.child("""
            done = []

            @task(name="cancel_all")
            async def cancel_all():
                for _ in range(200):
                    asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()},
                                   return_exceptions=True).cancel()
                    await asyncio.sleep(0)

            @task(name="work")
            async def work():
                async def part(n):
                    await asyncio.sleep(0.01)
                    return n
                return sum(await asyncio.gather(*map(part, range(5))))

            @task(name="own")
            async def own():
                part = asyncio.ensure_future(asyncio.sleep(60))
                waits = asyncio.gather(part, return_exceptions=True)
                await asyncio.sleep(0)
                part.cancel()
                return [type(found).__name__ for found in await waits]

            shared = []

            @task(name="share")
            async def share():
                shared.append(asyncio.ensure_future(asyncio.sleep(60)))
                await shared[0]

            @task(name="wait_for_shared")
            async def wait_for_shared():
                await shared[0]
            """)
        numbers = []
        for _ in range(20):
            child.beside("cancel_all")
            numbers += [child.beside("work"), child.beside("work")]
        for number in numbers:
            self.assertEqual(child.answer(number), 10)
        self.assertEqual(child.answer(child.beside("own")), ["CancelledError"])
        child.beside("share")
        began = time.monotonic()    # a limit ends it whoever's that is what it waits for
        number = child.beside("wait_for_shared", timeout=0.2)
        self.assertEqual(child.answer(number)["kind"], "timeout")
        self.assertLess(time.monotonic() - began, 3)

    def test_what_a_run_does_to_the_loop_is_undone(self):
        child = self.child("""
            from concurrent.futures import ThreadPoolExecutor

            @task(name="change")
            async def change(what):
                loop = asyncio.get_running_loop()
                if what == "factory":
                    loop.set_task_factory(
                        lambda loop, coroutine, **more:
                            asyncio.Task(coroutine, loop=loop, **more))
                elif what == "end":
                    await loop.shutdown_default_executor()
                elif what == "executor":
                    with ThreadPoolExecutor(1) as pool:
                        loop.set_default_executor(pool)
                else:
                    loop.set_exception_handler(print)
                    loop.set_debug(True)

            @task(name="look")
            async def look():
                async def leave():
                    sys.exit(3)
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, print, "works")
                found = loop.get_exception_handler(), loop.get_debug()
                try:
                    await asyncio.ensure_future(leave())
                except asyncio.CancelledError:
                    print(found)
                    raise
            """)
        for what in self.changes:
            with self.subTest(what):
                self.assertIsNone(child.answer(child.beside("change", what)))
                number = child.beside("look")
                self.assertEqual(child.answer(number)["type"], "SystemExit")
                self.assertEqual(child.printed(number), "works\n(None, False)\n")
        self.assertEqual(len(child.said(pybgworker.SPENT)), self.changes.count("end"))

    def test_an_exit_costs_the_run_and_not_the_loop(self):
        child = self.child("""
            async def ends(exc):
                raise exc

            @task(name="end")
            async def end(how):
                if how == "itself":
                    raise SystemExit(3)
                if how == "key":
                    await ends(KeyboardInterrupt())
                if how == "child":
                    asyncio.ensure_future(ends(SystemExit(3)))
                if how == "awaited":
                    await asyncio.gather(ends(SystemExit(3)), wait(60))
                if how == "late":
                    part = asyncio.ensure_future(ends(SystemExit(3)))
                    try:
                        await part
                    except BaseException:
                        return "no"
                if how == "callback":
                    asyncio.get_running_loop().call_soon(sys.exit, 3)
                    await asyncio.sleep(0.01)
                    return "callback"
                await asyncio.sleep(60)
            """)
        neighbour = child.beside("hold")
        for how in ("itself", "key", "child", "awaited", "late"):
            with self.subTest(how):
                error = child.answer(child.beside("end", how), timeout=5)
                self.assertEqual((error["kind"], error["type"], error["retryable"]), (
                    "exception", "KeyboardInterrupt" if how == "key" else "SystemExit",
                    False))
        self.assertEqual(child.answer(child.beside("end", "callback")), "callback")
        self.assertEqual(child.answer(child.beside("unknown")), b"")
        (self.folder / "go").touch()
        self.assertEqual(child.answer(neighbour), neighbour)

    def test_one_that_blocks_is_named_while_it_blocks(self):
        child = self.child("""
            async def blocks():
                while not os.path.exists("go"):
                    time.sleep(0.005)

            @task(name="block")
            async def block(way):
                if way == "task":
                    await asyncio.ensure_future(blocks())
                elif way == "itself":
                    await blocks()
                else:
                    blocks_in_ours()

            def blocks_in_ours():
                result = number.delay()         # of which no worker knows
                try:
                    result.get(timeout=3)
                except TimeoutError:
                    pass
            """)
        innocent = child.beside("wait", 60)
        for way in ("itself", "task", "get"):
            number = child.beside("block", way)
            until(lambda: child.said(pybgworker.LAGGED, number), timeout=5)
            (seconds, stack), = child.said(pybgworker.LAGGED)[-1:]
            self.assertLess(1, seconds)
            self.assertLess(seconds, 2.5)
            self.assertIn("in blocks", stack)
            self.assertEqual("pybgworker.py" in stack, way == "get")
            self.assertNotIn("in call", stack)
            self.assertEqual(child.answer(child.run("ordinary")), "ordinary")
            held = child.run("busy")            # neither does it hold up these
            until(lambda: child.printed(held))
            child.cancel(held)
            (self.folder / "go").touch()
            self.assertIsNone(child.answer(number, timeout=5))
            (self.folder / "go").unlink()
        self.assertEqual(child.said(pybgworker.LAGGED, innocent), [])

    def test_nobody_is_named_when_nobody_blocks(self):
        child = self.child("""
            @task(name="steps")
            async def steps(seconds):
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    time.sleep(0.05)
                    await asyncio.sleep(0)
            """)
        child.answer(child.beside("steps", 2.5))
        self.assertEqual(child.said(pybgworker.LAGGED), [])

    def test_a_process_that_one_forks_is_no_second_loop(self):
        child = self.child("""
            @task(name="fork")
            async def fork(how):
                pid = os.fork()
                if not pid:
                    if how == "return":
                        return "never answered"
                    if how == "raise":
                        raise ValueError("in the fork")
                    if how == "exit":
                        sys.exit(3)
                    await asyncio.sleep(0)
                return os.waitpid(pid, 0)[1] >> 8

            @task(name="part")
            async def part():
                return await asyncio.ensure_future(fork("await"))

            @task(name="count")
            async def count():
                with open("count", "a") as f:
                    for _ in range(100):
                        f.write("x")
                        f.flush()
                        await asyncio.sleep(0.001)
            """)
        counts = child.beside("count")
        for how, code in (("return", 0), ("raise", 1), ("exit", 3), ("await", 1)):
            with self.subTest(how):
                number = child.beside("fork", how)
                self.assertEqual(child.answer(number, timeout=5), code)
        self.assertEqual(child.answer(child.beside("part"), timeout=5), 1)
        self.assertIsNone(child.answer(counts))
        self.assertEqual((self.folder / "count").read_text(), "x" * 100)
        text = b"".join(child.said(pybgworker.WRITTEN)) + child.output.read()
        self.assertIn(b"cannot await", text)

    def test_it_may_start_processes_of_all_sorts(self):
        child = self.child("""
            from concurrent.futures import ProcessPoolExecutor

            def double(n):
                return n * 2

            @task(name="start")
            async def start(how):
                if how == "subprocess":
                    return subprocess.run(["true"]).returncode
                if how == "asyncio":
                    process = await asyncio.create_subprocess_exec(
                        "cat", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                    return (await process.communicate(b"text"))[0] != b"text"
                context = multiprocessing.get_context(how.split()[0])
                if "pool" in how:
                    with ProcessPoolExecutor(1, mp_context=context) as pool:
                        loop = asyncio.get_running_loop()
                        return await loop.run_in_executor(pool, double, 21) - 42
                process = context.Process(target=double, args=(1,))
                process.start()
                while process.is_alive():
                    await asyncio.sleep(0.01)
                return process.exitcode
            """)
        held = child.beside("hold")
        for how in ("subprocess", "asyncio", "fork process", "spawn process",
                    "forkserver process", "fork pool", "spawn pool"):
            with self.subTest(how):
                self.assertFalse(child.answer(child.beside("start", how)))
        (self.folder / "go").touch()
        self.assertEqual(child.answer(held), held)
        self.assertEqual(child.stop().code, 0)

    def test_threads_of_the_loop_work_for_who_asks_them(self):
        child = self.child("""
            def work(n):
                print("in a thread", n, end="")
                return current_task().id

            @task(name="ask")
            async def ask(n):
                loop = asyncio.get_running_loop()
                context = contextvars.copy_context()
                return [await loop.run_in_executor(None, work, n),
                        await loop.run_in_executor(None, context.run, work, n)]
            """)
        ids = [child.beside("ask", n) for n in range(20)]
        for n, number in enumerate(ids):
            self.assertEqual(child.answer(number), [number] * 2)
            self.assertEqual(child.printed(number), f"in a thread {n}" * 2)

    def test_a_context_is_of_one_run(self):
        child = self.child("""
            variable = contextvars.ContextVar("variable", default="nothing")

            @task(name="set")
            async def set():
                found = variable.get()
                variable.set("set")
                await asyncio.sleep(0)
                return found
            """, coroutines=2)
        for _ in range(3):
            ids = [child.beside("set") for _ in range(6)]
            self.assertEqual([child.answer(number) for number in ids], ["nothing"] * 6)

    def test_what_it_changes_of_the_process_is_put_back(self):
        """However short it was; for the next, and for those on the main thread."""
        child = self.child("""
            @task(name="spoil")
            async def spoil():
                os.set_blocking(1, False)
                os.chdir("/")
                os.environ["SPOILT"] = "yes"
                sys.stdout = None

                class Policy(asyncio.DefaultEventLoopPolicy):
                    def new_event_loop(self):
                        raise ValueError("not mine")

                asyncio.set_event_loop_policy(Policy())

            @task(name="look")
            def look():
                print("printed")
                asyncio.new_event_loop().close()
                return [os.get_blocking(1), os.getcwd(), os.environ.get("SPOILT")]
            """)
        for _ in range(3):
            self.assertIsNone(child.answer(child.beside("spoil")))
            for send in (child.run, child.beside):
                number = send("look")
                self.assertEqual(child.answer(number), [True, str(self.folder), None])
                self.assertEqual(child.printed(number), "printed\n")

    def test_a_result_or_an_error_is_that_of_any_task(self):
        child = self.child("""
            @task(name="give")
            async def give(how):
                if how == "object":
                    return object()
                if how == "retry":
                    raise Retry("again", countdown=5)
                if how == "cancelled":
                    raise asyncio.CancelledError
                return [how, current_task().id]
            """)
        number = child.beside("give", "value")
        self.assertEqual(child.answer(number), ["value", number])
        self.assertEqual(child.answer(child.beside("ordinary")), "ordinary")
        for how, type, retryable in (("object", "PayloadTypeError", False),
                                     ("retry", "Retry", True),
                                     ("cancelled", "CancelledError", False)):
            error = child.answer(child.beside("give", how))
            self.assertEqual((error["type"], error["retryable"], error["kind"]),
                             (type, retryable, "exception"))

    def test_a_stop_waits_for_all_and_ends_what_is_left(self):
        child = self.child("""
            import atexit
            atexit.register(lambda: print("bye"))
            lasting = []

            async def lasts():
                try:
                    while True:
                        try:
                            await asyncio.sleep(60)
                        except asyncio.CancelledError:
                            if lasting[1:]:
                                raise
                            lasting.append(1)
                finally:
                    print("left")

            @task(name="leave")
            async def leave():
                lasting.append(asyncio.ensure_future(lasts()))
                await asyncio.sleep(0)
            """)
        child.answer(child.beside("leave"), timeout=5)
        held = child.beside("hold")
        child.answer(child.beside("number"))
        child.wire.hang_up()
        (self.folder / "go").touch()
        self.assertEqual(child.answer(held), held)
        self.assertEqual(child.stop().code, 0)
        self.assertEqual(child.printed(0).split(), ["left", "bye"])

    def test_it_works_for_tasks_in_threads_too(self):
        child = self.child(threads=4)
        (self.folder / "go").touch()
        ids = [child.beside("hold") for _ in range(10)]
        held = [child.run("busy") for _ in range(4)]
        self.assertEqual([child.answer(number) for number in ids], ids)
        late = child.beside("wait", 60)
        for number in (*held, late):
            child.cancel(number)
            self.assertEqual(child.answer(number, timeout=5)["kind"], "cancelled")

    def test_without_a_descriptor_for_a_loop_the_run_has_failed(self):
        child = self.child("""
            import resource

            @task(name="lower")
            def lower():
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
                held = []
                try:
                    while True:
                        held.append(os.dup(0))
                except OSError:
                    print("lowered")
                try:
                    busy()
                finally:
                    [os.close(fd) for fd in held]
            """)
        lowers = child.run("lower")
        until(lambda: child.printed(lowers))
        error = child.answer(child.beside("number"))
        self.assertEqual((error["type"], error["retryable"]), ("OSError", True))
        child.cancel(lowers)
        child.answer(lowers)
        self.assertEqual(child.answer(child.beside("number")), child.pid)


class OnUvloop(OnTheLoop):
    """The same on another loop than that of asyncio."""

    policy = "import uvloop; asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())\n"
    changes = ["factory", "executor", "others"]     # an executor ends there for good

    @classmethod
    def setUpClass(cls):
        if importlib.util.find_spec("uvloop") is None:
            raise unittest.SkipTest("uvloop is not installed")



# == Child ====================================================================


class Children(Served):

    def test_a_child_that_cannot_import_the_app_ends_the_worker_with_its_traceback(self):
        (self.folder / "broken.py").write_text(
            "import os\nfrom pybgworker import task\n"
            "if os.environ.get('SEEN'): raise ValueError('only in children')\n"
            "os.environ['SEEN'] = '1'\n@task\ndef f(): pass\n"
        )
        worker = self.worker("--start-method", "spawn", app="broken")

        self.assertEqual(worker.wait(), 1)
        text = "".join(worker.errors)
        self.assertIn("ValueError: only in children", text)
        self.assertEqual(re.findall('File "(.*)"', text),
                         [str(self.folder.resolve() / "broken.py")])
        self.assertRegex(text, r"\(most recent call last\):\n *File .*broken.py")
        said, = worker.all("child_error")       # also where one only reads the log
        self.assertIn("ValueError: only in children", said["error"])
        self.assertIn("most recent call last", said["stack"])
        self.assertIn("only in children", worker.find("worker_stop")["error"])

    def test_what_an_import_raises_is_told_from_the_apps_first_line_on(self):
        (self.folder / "outer_of_two.py").write_text("import inner_of_two\n")
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        for inner in ("1 / 0", "a syntax error"):
            (self.folder / "inner_of_two.py").write_text(inner)
            for name in ("outer_of_two", "no_such_module"):
                try:
                    pybgworker.load_app(name)
                except Exception as exc:
                    exc.__traceback__ = exc.__traceback__.tb_next      # not this line
                    text = pybgworker.describe_exception(exc)["traceback"]
                found = re.findall('File "(.*)"', text)
                with self.subTest(inner, name=name):
                    self.assertEqual(
                        [os.path.basename(path) for path in found if path[0] != "<"],
                        ["outer_of_two.py", "inner_of_two.py"] * (name[0] == "o"))
                    self.assertNotIn("pybgworker.py", text)

    def test_processes_of_a_task_end_when_they_are_told_to(self):
        self.worker("--concurrency", 1)
        self.assertEqual(self.get(self.tasks.terminate.delay("terminate")), -15)
        self.assertEqual(self.get(self.tasks.pool_of_two.delay()), [0, 1, 4])

    def test_a_fork_that_comes_back_ends_with_its_own_status(self):
        self.worker("--concurrency", 1)
        self.assertEqual(self.get(self.tasks.fork_and_exit.delay(3)), 3)
        self.assertEqual(self.get(self.tasks.fork_and_exit.delay("raise")), 1)
        self.assertEqual(self.get(self.tasks.fork_and_exit.delay(None)), 0)

    def test_a_child_has_the_signals_of_a_fresh_process(self):
        """Whatever was ignored and blocked where the worker was started."""
        mask = {signal.SIGALRM, signal.SIGUSR1, signal.SIGCHLD}
        for number in (signal.SIGCHLD, signal.SIGPIPE):
            before = signal.signal(number, signal.SIG_IGN)
            self.addCleanup(signal.signal, number, before)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, mask)
        try:
            self.worker("--concurrency", 1)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.assertEqual(self.get(self.tasks.check_false.delay()), "raised")
        self.assertEqual(self.get(self.tasks.signal_state.delay()), [[], 0, 1])

    def test_a_child_that_does_not_know_the_task_hands_it_back(self):
        """After a deploy: the worker's code is old, that of a new child is new."""
        path = self.folder / "deployed.py"
        both = ("from pybgworker import task\n@task(retries=0)\ndef stays(): pass\n"
                "@task(retries=0)\ndef goes(): return 'done'\n")
        path.write_text(both)
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 1,
                             "--start-method", "spawn", app="deployed")
        worker.wait_for("worker_ready")
        path.write_text(both.partition("@task(retries=0)\ndef goes")[0])
        send = pybgworker.default_app.send
        for _ in range(3):                  # now every child is a new one
            self.get(send("deployed.stays", retries=0))
        gone = send("deployed.goes", retries=0)
        worker.wait_for("unknown_task", task_id=gone.id, name="deployed.goes")
        self.get(send("deployed.stays", retries=0))

        self.assertEqual((gone.status, gone.attempt), ("queued", 0))
        path.write_text(both)
        for _ in range(3):
            self.get(send("deployed.stays", retries=0))
        self.assertEqual(self.get(gone), "done")
        self.assertEqual(gone.attempt, 1)
        self.assertEqual(len(worker.all("unknown_task")), 1)

    def test_an_import_that_enqueues_is_an_error_that_names_the_line(self):
        self.module("@task\ndef f(): pass", name="other")
        for line in ("f.delay()", "f.delay_many([()])", "app.send('other.f')"):
            (self.folder / "eager.py").write_text(
                "from pybgworker import App, task\napp = App()\n"
                f"@task\ndef f(): pass\n{line}\n")
            worker = self.worker(app="eager")
            with self.subTest(line):
                self.assertEqual(worker.wait(), 1)
                text = "".join(worker.errors)
                self.assertIn("eager.py:5: this line enqueues while a worker", text)
                self.assertIn('if __name__ == "__main__":', text)
                self.assertEqual(self.sql("select count(*) from bg_task")
                                 if self.db.exists() else [(0,)], [(0,)])

    def test_children_get_the_flags_of_the_interpreter(self):
        (self.folder / "flags.py").write_text(
            "import sys\nfrom pybgworker import task\n@task(retries=0)\n"
            "def flags(): return [sys.flags.optimize, sys.flags.utf8_mode, "
            "sys.flags.dev_mode, 'error' in sys.warnoptions]\n")
        for method in ("fork", "spawn"):
            result = pybgworker.default_app.send("flags.flags", retries=0)
            done = subprocess.run(
                [sys.executable, "-O", "-W", "error", "-X", "utf8", "-X", "dev", "-m",
                 "pybgworker", "run", "--app", "flags", "--burst", "--start-method", method],
                cwd=self.folder,
                env=clean_environment(PYBGWORKER_DB=str(self.db), PYTHONWARNINGS=""),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=60)
            with self.subTest(method):
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(self.get(result), [1, 1, True, True])

    def test_a_task_finds_nothing_that_the_one_before_has_changed(self):
        """Folder, environment, umask, depth, streams, handlers, alarms, loops."""
        (self.folder / "untidy.py").write_text(textwrap.dedent("""
            import asyncio, os, signal, sys, time
            from pybgworker import task

            signal.signal(signal.SIGALRM, signal.SIG_IGN)      # none of the app's

            def state():
                umask = os.umask(0o22)
                os.umask(umask)
                return [os.getcwd(), sorted(os.environ.items()), umask,
                        sys.getrecursionlimit(), type(sys.stdout).__name__,
                        signal.getsignal(signal.SIGTERM) is signal.SIG_IGN,
                        str(signal.getsignal(signal.SIGCHLD)),
                        str(signal.getsignal(signal.SIGPIPE)), type(os.environ).__name__,
                        signal.getitimer(signal.ITIMER_REAL)[0] > 0]

            @task(name="look", retries=0)
            def look():
                time.sleep(0.3)         # an alarm that was left would ring
                return state()

            @task(name="spoil", retries=0)
            def spoil():
                os.chdir("/")
                os.environ._data = {os.environ.encodekey("OTHERS"): b"1"}
                os.environ["SPOILT"] = "1"
                os.environ.pop("PATH", None)
                os.umask(0o177)
                sys.setrecursionlimit(77777)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                os.environ = {"NEW": "1"}
                signal.setitimer(signal.ITIMER_REAL, 0.1)
                print("before", end="")
                sys.stdout = open(os.devnull, "w")

            @task(name="limited", retries=0)
            def limited():
                time.sleep(30)

            @task(name="loop", retries=0)
            def loop():
                try:
                    asyncio.get_event_loop_policy().get_event_loop().close()
                except RuntimeError:
                    return "none"
                asyncio.set_event_loop(None)
                return "one"

            @task(name="wait", retries=0)
            async def wait():
                asyncio.ensure_future(asyncio.sleep(60))       # left behind
                await asyncio.sleep(0)
                return asyncio.get_running_loop().is_running()
            """))
        def send(name, **options):
            return pybgworker.default_app.send(name, retries=0, **options)
        early = send("limited", timeout=0.2)        # the first run of its child
        self.worker("--concurrency", 1, app="untidy")
        self.assertEqual(self.failure(early).error_type, "TaskTimeout")
        first = self.get(send("look"))
        fresh = self.python("""
            import asyncio
            try:
                asyncio.get_event_loop_policy().get_event_loop()
                print("one")
            except RuntimeError:
                print("none")
        """).stdout.strip()
        self.assertEqual(self.get(send("wait")), True)
        self.assertEqual(self.get(send("loop")), fresh)
        self.get(send("spoil"))
        self.assertEqual(self.get(send("look")), first)
        failed = self.failure(send("limited", timeout=0.2))
        self.assertEqual(failed.error_type, "TaskTimeout")

    def test_a_blocked_signal_is_put_right_after_the_shortest_run(self):
        """Else the next one, which may lie in the pipe already, has no time limit."""
        done = self.python("""
            import signal, pybgworker
            around = pybgworker.Surroundings({})
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            around.restore(pybgworker.standard_streams())
            print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        """)
        self.assertEqual(done.stdout, "set()\n", done.stderr)

    def test_a_task_finds_its_process_as_the_app_has_left_it(self):
        """Descriptors, timers, masks, all signals, limits, contexts, time-outs."""
        (self.folder / "spoilt.py").write_text(textwrap.dedent("""
            import contextvars, decimal, faulthandler, os, resource, signal, socket
            import subprocess, sys, time
            from pybgworker import task

            name = contextvars.ContextVar("name", default="nobody")
            kept = contextvars.ContextVar("kept", default="nothing")
            kept.set("by the app")
            decimal.getcontext().prec = 11
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            WAYS = ["output", "closed", "mask", "timer", "limit", "context", "signals",
                    "nonblock"]

            @task(name="look", retries=0)
            def look():
                wait = time.monotonic() + 0.02      # by computing, for the timer
                while time.monotonic() < wait:
                    pass
                os.write(1, b"first\\n")
                with open("own", "w") as f:
                    own = f.fileno() > 2
                subprocess.run(["echo", "second"])
                numbers = [1, 2, 10, 12, 15, 17, 25, 27, max(signal.valid_signals())]
                return os.getpid(), [own, name.get(), kept.get(), decimal.getcontext().prec,
                        socket.getdefaulttimeout(), os.get_blocking(1),
                        sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
                        [signal.getsignal(n) in (0, 1) and int(signal.getsignal(n))
                         for n in numbers],
                        resource.getrlimit(resource.RLIMIT_FSIZE)[0]]

            @task(name="spoil", retries=0)
            def spoil(way):
                if way == "output":
                    os.dup2(os.open("stolen", os.O_WRONLY | os.O_CREAT), 1)
                elif way == "closed":
                    os.closerange(0, 3)
                elif way == "mask":
                    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
                elif way == "timer":
                    signal.setitimer(signal.ITIMER_PROF, 0.005)
                elif way == "limit":
                    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
                elif way == "context":
                    name.set("somebody"), kept.set("by a task")
                    decimal.getcontext().prec = 3
                    socket.setdefaulttimeout(0.001)
                elif way == "signals":
                    for number in signal.valid_signals() - {9, 19}:
                        signal.signal(number, signal.SIG_IGN)
                elif way == "nonblock":
                    os.set_blocking(1, False)
                return os.getpid()

            @task(name="later", retries=0)
            async def later(way):
                return spoil.fn(way)

            @task(name="stuck", retries=0)
            def stuck():
                while True:
                    try:
                        time.sleep(60)
                    except Exception:
                        pass
            """))
        send = pybgworker.default_app.send
        worker = self.worker("--concurrency", 1, app="spoilt")
        _, first = self.get(send("look", retries=0))
        ways = ["output", "closed", "mask", "timer", "limit", "context", "signals",
                "nonblock"]
        for n, way in enumerate(ways):
            pid = now = 0
            while pid != now or not pid:        # the first run may be the spare's
                pid = self.get(send(("spoil", "later")[n % 2], way, retries=0))
                after = send("look", retries=0)
                now, found = self.get(after)
            with self.subTest(way):
                self.assertEqual(found, first)
                self.assertEqual(self.store.output(after.id), "first\nsecond\n")
        self.assertEqual(first[0:4], [True, "nobody", "by the app", 11])
        self.get(send("spoil", "signals", retries=0))
        failed = self.failure(send("stuck", retries=0, timeout=0.2))    # still dumped
        self.assertEqual(failed.kind, "timeout")
        self.assertIn("in stuck", failed.traceback)
        self.assertEqual(worker.all("child_error"), [])

    def test_a_deadline_is_as_far_away_as_before_when_the_clock_is_set(self):
        frame = pybgworker.write_frame(
            Run(1, "t", "q", 0, 0, 0, 60.0, 0, None, "", 5))
        run = pybgworker.Running(frame, mock.Mock(tasks={}), None, None)
        self.addCleanup(pybgworker.in_flight.clear)
        real = time.time
        for hours in (0, 1, -30):
            with mock.patch.object(time, "time", lambda: real() + hours * 3600):
                left = run.current.deadline - time.time()
            with self.subTest(hours):
                self.assertAlmostEqual(left, 60, delta=10)
        frame = pybgworker.write_frame(Run(2, "t", "q", 0, 0, 0, None, 0, None, "", 5))
        run = pybgworker.Running(frame, mock.Mock(tasks={}), None, None)
        self.assertIsNone(run.current.deadline)

    def test_a_thread_that_outlives_its_run_speaks_for_no_other(self):
        (self.folder / "threads.py").write_text(textwrap.dedent("""
            import os, threading, time
            from pybgworker import current_task, task

            @task(name="leave", retries=0)
            def leave():
                own = current_task()
                def go_on():
                    while not os.path.exists("go"):
                        time.sleep(0.005)
                    print("left over")
                    for task in (own, current_task()):
                        task.set_progress(77, "left over")
                    open("went", "w").close()
                threading.Thread(target=go_on).start()
                print("in time")
                own.set_progress(10)
                return os.getpid()

            @task(name="next", retries=0)
            def next(pid):
                if os.getpid() != pid:      # the first run was the spare's
                    return False
                print("next")
                open("go", "w").close()
                while not os.path.exists("went"):
                    time.sleep(0.005)
                time.sleep(0.05)
                current_task().set_progress(20)
                thread = threading.Thread(target=print, args=("own thread",))
                thread.start()
                thread.join()
                return True
            """))
        send = pybgworker.default_app.send
        worker = self.worker("--concurrency", 1, app="threads")
        done = False
        while not done:
            first = send("leave", retries=0)
            then = send("next", self.get(first), retries=0)
            done = self.get(then)
        said = worker.wait_for("output", text="left over")

        self.assertNotIn("task_id", said)
        self.assertEqual(self.store.output(first.id), "in time\n")
        self.assertEqual(self.store.output(then.id), "next\nown thread\n")
        self.assertEqual((first.progress.percent, then.progress.percent), (10, 20))
        self.assertEqual(worker.all("child_error"), [])

    def test_a_time_limit_that_falls_into_a_fork_is_kept(self):
        """The interpreter drops what a handler raises inside its fork hooks."""
        interrupts = pybgworker.Interrupts(pybgworker.ChildEnd(*self.ends()))
        raised = []

        def handle(*_):
            try:
                interrupts.on_alarm()
            except pybgworker.TaskTimeout as exc:
                raised.append((interrupts.forking, exc))

        interrupts.handlers[signal.SIGALRM] = handle
        before = signal.signal(signal.SIGALRM, handle)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        interrupts.begin(types.SimpleNamespace(of=(7, 1), raised=None))
        interrupts.before_fork()
        os.kill(os.getpid(), signal.SIGALRM)
        interrupts.after_fork()                     # the mask goes, and the signal comes
        until(lambda: raised, what="the time limit")
        self.assertEqual([forking for forking, _ in raised], [0])
        self.assertIsNone(interrupts.pending)

    def test_a_default_timeout_of_sockets_is_not_for_ours(self):
        """Set by the app, before the child has its sockets, or by a task."""
        (self.folder / "timeouts.py").write_text(textwrap.dedent("""
            import os, socket
            from pybgworker import task
            socket.setdefaulttimeout(0.02)

            @task(name="pid", retries=0)
            def pid():
                socket.setdefaulttimeout(0.01)
                return os.getpid()
            """))
        site = self.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text("import socket\n"
                                               "socket.setdefaulttimeout(0.02)\n")
        for path in (str(HERE), f"{site}:{HERE}"):
            worker = self.worker("--concurrency", 1, app="timeouts", PYTHONPATH=path)
            pids = set()
            for _ in range(4):
                pids.add(self.get(self.app.send("pid", retries=0)))
                time.sleep(0.05)            # longer than any of these limits
            started_at = time.monotonic()
            with self.subTest(path):
                self.assertEqual(worker.stop(), 0)
                self.assertLess(time.monotonic() - started_at, 2)
                self.assertLessEqual(len(pids), 2)          # one is a spare
                self.assertEqual(worker.all("child_error"), [])

    def test_what_a_task_does_to_our_descriptors_costs_it_alone(self):
        (self.folder / "rude.py").write_text(textwrap.dedent("""
            import os, time
            from pybgworker import task

            @task(name="hurry", retries=0)
            def hurry():
                for fd in range(3, 64):
                    try:
                        os.set_blocking(fd, False)
                    except OSError:
                        pass
                print("x" * 60_000)
                return os.getpid()

            @task(name="close", retries=0)
            def close(seconds):
                os.closerange(3, 256)
                time.sleep(seconds)
            """))
        worker = self.worker("--concurrency", 1, app="rude")
        pids = {self.get(self.app.send("hurry", retries=0)) for _ in range(4)}
        self.assertLessEqual(len(pids), 2)
        self.assertEqual(worker.all("child_error"), [])
        for seconds in (0, 0.5):            # it ends by itself; it does not
            failed = self.failure(self.app.send("close", seconds, retries=0))
            self.assertEqual(failed.kind, "crash")
            self.assertIn("closed the connection of its process", str(failed))

    def test_a_child_that_ends_with_nothing_to_do_is_said(self):
        worker = self.worker("--concurrency", 1)
        pid = self.get(self.tasks.my_pid.delay())
        os.kill(pid, signal.SIGKILL)
        event = worker.wait_for("child_error", pid=pid)
        self.assertIn("nothing to do: killed", event["error"])
        self.assertNotEqual(self.get(self.tasks.my_pid.delay()), pid)

    def test_a_cancellation_that_comes_late_ends_no_other_run(self):
        """It names the run it means, which may have just finished."""
        interrupts = pybgworker.Interrupts(pybgworker.ChildEnd(*self.ends()))
        interrupts.begin(types.SimpleNamespace(of=(2, 1), raised=None))
        for wanted in ((), (1,), (1, 3)):
            self.worker_end.send(b"".join(n.to_bytes(8, "big") for n in wanted))
            interrupts.on_cancel()
        self.worker_end.send((1).to_bytes(8, "big") + (2).to_bytes(8, "big"))
        self.assertRaises(pybgworker.TaskCancelled, interrupts.on_cancel)

    def ends(self):
        """Descriptors such as a child is given."""
        frames, messages = pybgworker.frame_pair(), pybgworker.socket.socketpair()
        for end in (*frames, *messages):
            self.addCleanup(end.close)
        self.worker_end = messages[1]
        return os.dup(frames[0].fileno()), os.dup(messages[0].fileno())

    def test_a_child_ends_as_a_program_does(self):
        """Exit handlers run and buffers are flushed: at a stop, and when replaced."""
        (self.folder / "leaving.py").write_text(textwrap.dedent("""
            import atexit, os
            from pybgworker import task
            buffered = open("buffered", "a")

            @task(name="leave", retries=0)
            def leave():
                buffered.write("whole\\n")
                atexit.register(lambda: open(f"atexit{os.getpid()}", "w").write("ran"))
                return os.getpid()
            """))
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 2,
                             app="leaving")
        pids = [self.get(pybgworker.default_app.send("leave")) for _ in range(3)]
        self.assertEqual(worker.stop(), 0)
        self.assertGreater(len(set(pids)), 1)
        self.assertEqual(self.lines("buffered"), ["whole"] * 3)
        for pid in set(pids):
            self.assertEqual(self.lines(f"atexit{pid}")[0][:3], "ran")

    def test_a_child_whose_exit_handlers_do_not_end_is_killed(self):
        """When it is replaced, and at a stop."""
        (self.folder / "staying.py").write_text(textwrap.dedent("""
            import atexit, os, time
            from pybgworker import task

            @task(name="stay", retries=0)
            def stay():
                atexit.register(time.sleep, 60)
                return os.getpid()
            """))
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 1,
                             app="staying")
        pid = self.get(pybgworker.default_app.send("stay", retries=0))
        until(lambda: not is_alive(pid))
        worker.stop()
        worker = self.worker("--concurrency", 1, app="staying")
        pid = self.get(pybgworker.default_app.send("stay", retries=0))
        self.assertEqual(worker.stop(20), 0)
        self.assertFalse(is_alive(pid))

    def test_a_stop_that_interrupts_a_run_lets_idle_children_end(self):
        (self.folder / "leaving.py").write_text(textwrap.dedent("""
            import atexit, os, time
            from pybgworker import task

            @task(name="leave", retries=0)
            def leave(seconds):
                atexit.register(lambda: open(f"atexit{os.getpid()}", "w").write("ran"))
                time.sleep(seconds)
                return os.getpid()
            """))
        worker = self.worker("--concurrency", 2, "--shutdown-timeout", 0.2,
                             app="leaving")
        long = pybgworker.default_app.send("leave", 60)
        worker.wait_for("task_start", task_id=long.id)
        pid = self.get(pybgworker.default_app.send("leave", 0))
        self.assertEqual(worker.stop(), 0)
        self.assertEqual(self.lines(f"atexit{pid}")[0][:3], "ran")
        self.assertEqual(long.status, "queued")

    def test_abort_wins_over_the_time_limit_it_answers(self):
        self.worker()
        failed = self.failure(self.tasks.abort_at_timeout.delay())

        self.assertEqual((failed.kind, failed.error_type), ("abort", "Abort"))
    def test_abort_from_another_exception_is_an_abort(self):
        self.worker()
        failed = self.failure(self.tasks.abort_from.delay())
        self.assertEqual((failed.kind, failed.error_type), ("abort", "Abort"))

    def test_the_tasks_own_frames_begin_a_traceback(self):
        self.worker()
        failed = self.failure(self.tasks.picky.delay())
        lines = failed.traceback.splitlines()

        self.assertEqual(lines[0], "Traceback (most recent call last):")
        self.assertIn("tasks.py", lines[1])
        self.assertNotIn("pybgworker.py", failed.traceback)


# == Nursery ==================================================================


# A thread that Python knows nothing of, and a function that ends it.
NATIVE_THREAD = """import ctypes
libc, thread = ctypes.CDLL(None), ctypes.c_ulong()
libc.pthread_create(ctypes.byref(thread), None, libc.pause, None)
def end_thread():
    if thread.value:
        libc.pthread_cancel(thread)
        libc.pthread_join(thread, None)
        thread.value = 0
"""


class Nurseries(Served):

    def app_with(self, code):
        """An app `opening` that does this when it is imported.

        Compiled anew: of two versions of a second Python takes the older, if they are
        as long.
        """
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)
        (self.folder / "opening.py").write_text(
            "import os, random, socket, sqlite3, threading, time, uuid\n"
            "from pybgworker import task\n"
            "@task(name='pids', retries=0)\ndef pids():\n"
            "    return [os.getpid(), os.getppid(), random.random(), uuid.uuid4().hex]\n"
            "@task(name='sleep', retries=0)\ndef sleep(seconds): time.sleep(seconds)\n"
            + textwrap.dedent(code))

    def send(self, name, *args):
        return pybgworker.default_app.send(name, *args, retries=0)

    def test_a_child_is_forked_where_that_is_safe(self):
        """Else the log, and inspect, say why not."""
        if not Path("/proc/self/fd").exists():
            self.skipTest("needs /proc")
        server = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(server.close)
        port = server.getsockname()[1]
        for code, why in (
            ("", None),
            ("held = open('a.log', 'w'), open('/dev/null')", None),
            ("thread = threading.Thread(target=print)\nthread.start()\nthread.join()", None),
            ("gone = socket.socket()\ngone.close()", None),
            (f"held = socket.create_connection(('127.0.0.1', {port}))",
             f"opened a socket to 127.0.0.1:{port}"),
            ("held = socket.socket()\nheld.bind(('127.0.0.1', 0))",
             "opened a socket on 127.0.0.1:"),
            ("held = socket.socket()", "opened a socket while"),
            ("held = os.pipe()", "opened a pipe"),
            ("import select\nheld = select.epoll()", "opened an epoll object"),
            ("held = sqlite3.connect('of_app')\nheld.execute('create table if not exists t (x)')",
             f"opened the SQLite file {self.folder.resolve()}/of_app"),
            ("threading.Thread(target=time.sleep, args=(60,), name='mine',"
             " daemon=True).start()", "started the thread 'mine'"),
            (NATIVE_THREAD, "loaded a library that started threads"),
            # As OpenBLAS does: it has none while a process forks.
            (NATIVE_THREAD + "os.register_at_fork(before=end_thread)\n", None),
        ):
            with self.subTest(code):
                self.app_with(code)
                worker = self.worker("--concurrency", 1, app="opening")
                said = worker.wait_for("worker_ready")["start_method"]
                report, = pybgworker.inspect_report(
                    self.store, pybgworker.now_ms(), 15)["workers"]
                self.assertEqual(report["start_method"], said)
                if why is None:
                    self.assertEqual(said, "fork")
                else:
                    self.assertTrue(said.startswith(f"spawn, because the app {why}"), said)
                    self.assertTrue(said.endswith(" while it was imported"), said)
                self.assertEqual(self.get(self.send("pids"))[1], worker.nursery())
                self.assertEqual(worker.stop(), 0)

    def test_where_nobody_can_look_nothing_is_forked(self):
        with mock.patch.object(pybgworker, "IS_LINUX", False):
            self.assertIn("not safe on", pybgworker.why_not_fork({}))

    def test_numpy_keeps_no_app_from_being_forked(self):
        """Nor does it give all children the same numbers."""
        if importlib.util.find_spec("numpy") is None:
            self.skipTest("numpy is not installed")
        self.app_with("""
            import numpy
            @task(name="numbers")
            def numbers():
                numpy.ones((300, 300)) @ numpy.ones((300, 300))
                return numpy.random.rand(4).tolist()
            """)
        worker = self.worker("--max-tasks-per-child", 1, app="opening")
        self.assertEqual(worker.wait_for("worker_ready")["start_method"], "fork")
        found = [self.get(self.send("numbers")) for _ in range(3)]
        self.assertEqual(len(set(map(tuple, found))), 3)

    def test_the_start_method_can_be_chosen(self):
        self.app_with("")
        (self.folder / "opening.py").open("a").write(
            "open('imported', 'a').write(f'{os.getpid()}\\n')\n")
        for method, imports in (("fork", 1), ("spawn", 3)):
            worker = self.worker("--concurrency", 1, PYBGWORKER_START_METHOD=method,
                                 app="opening")
            said = worker.wait_for("worker_ready")["start_method"]
            self.assertEqual(said.partition(",")[0], method)
            pids = self.wait_lines("imported", imports)
            self.assertEqual(len(pids), imports)
            self.assertNotIn(str(worker.pid), pids, "a worker never imports the app")
            self.assertEqual(worker.stop(), 0)
            (self.folder / "imported").unlink()
        refused = self.cli("run", "--app", "opening", PYBGWORKER_START_METHOD="thread")
        self.assertEqual(refused.returncode, 1)
        self.assertIn("must be auto, fork or spawn", refused.stderr)

    def test_what_is_random_differs_in_each_forked_child(self):
        """That of numpy, too, which this package stands in for."""
        (self.folder / "numpy").mkdir()
        (self.folder / "numpy" / "__init__.py").touch()
        (self.folder / "numpy" / "random.py").write_text(
            "import random\nown = random.Random(1)\n"
            "def seed(): own.seed()\n")
        self.app_with("""
            import ssl, tempfile
            import numpy.random
            random.seed(1)

            @task(name="drawn", retries=0)
            def drawn():
                return [os.getpid(), os.getppid(), random.random(), uuid.uuid4().hex,
                        numpy.random.own.random(), ssl.RAND_bytes(9).hex(),
                        next(names)]

            names = tempfile._get_candidate_names()
            next(names), ssl.RAND_bytes(9)
            """)
        self.worker("--concurrency", 2, "--max-tasks-per-child", 1, app="opening")
        found = [self.get(self.send("drawn")) for _ in range(4)]
        for values in zip(*[[pid, *rest] for pid, _, *rest in found]):
            self.assertEqual(len(set(values)), 4)

    def test_what_the_import_has_made_is_there_until_the_last_child_has_ended(self):
        self.app_with("""
            import weakref
            class Scratch: pass
            held = Scratch()
            open("scratch", "w").close()
            weakref.finalize(held, os.unlink, os.path.abspath("scratch"))
            @task(name="own")
            def own(name):
                own.held = Scratch()
                open(name, "w").close()
                weakref.finalize(own.held, os.unlink, os.path.abspath(name))
                return os.path.exists("scratch"), os.getpid()
            """)
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 1, app="opening")
        worker.wait_for("worker_ready", start_method="fork")
        pids = set()
        for name in "abcde":
            is_there, pid = self.get(self.send("own", name))
            self.assertTrue(is_there)
            pids.add(pid)
            until(lambda: not (self.folder / name).exists(), what="its own to go with it")
        self.assertEqual(len(pids), 5)
        self.assertEqual(worker.stop(), 0)
        self.assertFalse((self.folder / "scratch").exists(), "and not after that")

    def test_a_nursery_that_is_killed_or_stopped_is_replaced(self):
        """With all that it had: its children, and what they have started."""
        if not Path("/proc/self/task").exists():
            self.skipTest("needs /proc")
        worker = self.worker("--concurrency", 1)
        for number in (signal.SIGKILL, signal.SIGSTOP):
            with self.subTest(number):
                self.get(self.tasks.add.delay(1, 2))
                held = self.tasks.hold_on.delay()
                pids = [int(pid) for pid in self.wait_lines("pids")[0].split()]
                old = worker.nursery()
                pids += [old, *worker.children()]
                os.kill(old, number)
                if number == signal.SIGSTOP:        # is noticed when it has to do something
                    os.kill(pids[0], signal.SIGKILL)
                until(lambda: not any(map(is_alive, pids)), 1.8)
                held.cancel()
                self.assertEqual(self.get(self.tasks.add.delay(3, 4)), 7)
                self.assertNotEqual(worker.nursery(), old)
                errors = worker.all("child_error")
                self.assertEqual(len([e for e in errors if "nursery" in e["error"]]), 1)
                worker.events.clear()
                (self.folder / "pids").unlink()
        self.assertEqual(worker.stop(), 0)

    def test_a_stopped_nursery_cleans_up_after_a_killed_worker_all_the_same(self):
        if not sys.platform.startswith("linux"):
            self.skipTest("its kernel tells nobody of a parent's death")
        worker = self.worker("--concurrency", 1)
        self.tasks.hold_on.delay()
        pids = [int(pid) for pid in self.wait_lines("pids")[0].split()]
        pids += [worker.nursery(), *worker.children()]
        os.kill(worker.nursery(), signal.SIGSTOP)
        worker.kill()
        until(lambda: not any(map(is_alive, pids)), 1, "the end of all processes")

    def test_who_kills_the_nursery_is_charged_and_its_neighbours_are_not(self):
        """Each runs again, with nothing else in flight in its child: also beside it."""
        worker = self.worker("--concurrency", 2)
        worker.wait_for("worker_ready")
        innocent = self.tasks.hold.options(retries=0).delay()
        self.wait_lines("held")
        bad = self.tasks.kill_nursery.delay()
        self.wait_lines("held", 3)
        (self.folder / "go").touch()
        self.get(innocent)
        row = self.store.task(innocent.id)
        self.assertEqual(row.attempt - row.forgiven, 1)
        self.assertEqual(self.failure(bad).kind, "crash")
        row = self.store.task(bad.id)
        self.assertEqual(row.attempt - row.forgiven, 2)
        self.assertTrue(worker.all("task_lost", task_id=innocent.id))
        self.assertEqual(worker.stop(), 0)

    def test_a_child_that_is_killed_is_replaced_within_a_moment(self):
        if not Path("/proc/self/task").exists():
            self.skipTest("needs /proc")
        worker = self.worker("--concurrency", 1)
        worker.wait_for("worker_ready")
        for _ in range(3):
            self.tasks.hold_on.delay()
            busy = int(self.wait_lines("pids")[0].split()[0])
            until(lambda: len(worker.children()) == 2)
            old = set(worker.children())
            (self.folder / "pids").unlink()
            began = time.monotonic()
            os.kill(busy, signal.SIGKILL)
            until(lambda: set(worker.children()) - old)
            self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
            self.assertLess(time.monotonic() - began, 0.9)

    def test_an_import_that_hangs_ends_with_its_worker(self):
        """Killed, or told to stop; and what it has started by then."""
        self.app_with("open('here', 'w').write(f'{os.getpid()}\\n')\ntime.sleep(60)\n")
        for end in ("kill", "stop"):
            worker = self.worker(app="opening")
            pid = int(self.wait_lines("here")[0])
            until(lambda: is_alive(pid))
            began = time.monotonic()
            if end == "kill":
                worker.process.kill()
            else:
                self.assertEqual(worker.stop(), 0)
            until(lambda: not is_alive(pid), 2)
            self.assertLess(time.monotonic() - began, 2)
            (self.folder / "here").unlink()

    def test_an_import_that_ends_the_process_is_told_in_one_message(self):
        for code, words in (
            ("os._exit(7)", "ended with exit code 7"),
            ("os.kill(os.getpid(), 11)", "ended with SIGSEGV"),
            ("raise SystemExit(3)", "SystemExit: 3"),
        ):
            with self.subTest(code):
                self.app_with(code)
                done = self.cli("run", "--app", "opening")
                self.assertEqual((done.returncode, done.stdout), (1, ""))
                self.assertIn("cannot import --app opening:", done.stderr)
                self.assertIn(words, done.stderr)
                self.assertEqual(done.stderr.count("pybgworker: "), 1)

    def test_a_forked_child_has_what_the_import_has_set(self):
        """Signals, streams, modules; and nothing of the nursery's."""
        self.app_with("""
            import logging, signal, sys
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, lambda *_: None)
            handler = signal.getsignal(signal.SIGCHLD)
            logging.basicConfig(level=logging.INFO, format="%(message)s")
            print("begun at the import", end=" ")

            @task(name="state", retries=0)
            def state():
                logging.info("logged")
                fds = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                       if os.path.exists(f"/proc/self/fd/{fd}")
                       or os.path.islink(f"/proc/self/fd/{fd}")]
                return [signal.getsignal(signal.SIGHUP) == signal.SIG_IGN,
                        signal.getsignal(signal.SIGCHLD) is handler,
                        signal.set_wakeup_fd(-1), os.getsid(0) == os.getpid(),
                        sum(fd.startswith("socket:") for fd in fds)]
        """)
        if not Path("/proc/self/fd").exists():
            self.skipTest("needs /proc")
        worker = self.worker("--concurrency", 1, app="opening")
        result = self.send("state")
        self.assertEqual(self.get(result), [True, True, -1, True, 2])
        self.assertEqual(worker.wait_for("worker_ready")["start_method"], "fork")
        worker.wait_for("output", task_id=result.id, text="logged")
        self.assertEqual(len(worker.all("output", text="begun at the import ")), 1)

    def test_the_end_of_an_import_is_seen_while_what_it_has_forked_lives(self):
        """That has a copy of our end of the connection."""
        for code, words in (
            ("import multiprocessing as m\nm.get_context('fork').Process("
             "target=time.sleep, args=(60,), daemon=True).start()\n"
             "os.kill(os.getpid(), 9)", "ended with SIGKILL"),
            ("if os.fork():\n    os._exit(4)", "ended with exit code 4"),
            ("if os.fork():\n    os.closerange(3, 99)\n    time.sleep(9)", "closed its connection"),
        ):
            with self.subTest(code):
                self.app_with(code)
                done = self.cli("run", "--app", "opening", timeout=10)
                self.assertEqual(done.returncode, 1)
                self.assertIn(words, done.stderr)

    def test_what_an_import_has_started_ends_with_its_worker(self):
        """Also before it is over; and exit handlers do not keep the nursery for long."""
        if not pybgworker.IS_LINUX:
            self.skipTest("a kernel must kill the group")
        (self.folder / "made").mkdir()
        for seconds in (60, 0):
            with self.subTest(seconds):
                self.app_with(f"""
                    import atexit, subprocess, tempfile
                    mine = subprocess.Popen(["sleep", "60"])
                    atexit.register(time.sleep, 60)
                    made = tempfile.TemporaryDirectory(dir="made")
                    open("here", "a").write(f"{{os.getpid()}}\\n{{mine.pid}}\\n")
                    time.sleep({seconds})
                """)
                worker = self.worker("--concurrency", 1, app="opening")
                pids = list(map(int, self.wait_lines("here", 2)))
                if not seconds:
                    worker.wait_for("worker_ready")
                worker.process.kill()
                until(lambda pids=pids: not any(map(is_alive, pids)), 1)
                (self.folder / "here").unlink()
        self.assertEqual(len(os.listdir(self.folder / "made")), 1)      # of the first

    def test_signals_that_an_app_blocks_are_blocked_in_its_children_alone(self):
        self.app_with("""
            import signal
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            @task(name="end")
            def end(): os.abort()
            @task(name="blocked")
            def blocked(): return list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        """)
        self.worker("--concurrency", 1, app="opening")
        error = self.failure(self.send("end"))
        self.assertIn("SIGABRT: abort()", str(error))
        self.assertEqual(self.get(self.send("blocked")), [signal.SIGCHLD])

    def test_a_nursery_that_never_has_a_child_is_given_up(self):
        for code, how in (
            ("os.register_at_fork(before=lambda: os.kill(os.getpid(), 4))",
             "the nursery, before a child of it was ready, ended with SIGILL"),
            ("import types\ndef seed(): raise OSError('no seed')\n"
             "sys.modules['numpy.random'] = types.SimpleNamespace(seed=seed)",
             "OSError: no seed"),
        ):
            with self.subTest(code):
                self.app_with("import sys\n" + code)
                worker = self.worker("--concurrency", 1, app="opening")
                self.assertEqual(worker.wait(20), 1)
                said = worker.all("child_error")
                self.assertEqual(len(said), 1)
                self.assertIn(how, said[0]["error"])
                self.assertIn(how, "".join(worker.errors))

    def test_a_nursery_ends_as_a_program_does(self):
        """Not by a signal, whether it has the app or not."""
        self.app_with("if 'BROKEN' in os.environ:\n    raise ValueError('broken')\n")
        with mock.patch.object(sys, "path", [str(self.folder), *sys.path]), \
                mock.patch.dict(os.environ):
            for _ in range(2):
                nursery = pybgworker.Nursery("opening")
                nursery.start(time.monotonic())
                process = nursery.process
                until(lambda nursery=nursery: nursery.hear() or not nursery.is_importing)
                nursery.stop(pybgworker.EXIT_GRACE)
                self.assertEqual((process.exit.signal, process.exit.code), (None, 0))
                os.environ["BROKEN"] = "yes"

    def test_a_nursery_that_has_just_died_is_no_failure_of_a_child(self):
        """How it ended is what is said, when that is heard."""
        nursery, log = mock.Mock(failure=None, can_bear=True), mock.Mock()
        crew = pybgworker.Crew(nursery, 1, log, mock.Mock(), mock.Mock())
        for exc, times in ((BrokenPipeError, 0), (ConnectionResetError, 0), (OSError, 1)):
            with mock.patch.object(pybgworker, "Member", side_effect=exc):
                crew.fill(0.0)
            self.assertEqual((crew.starts.failures, log.call_count), (times, times))

    def test_folders_that_are_no_text_do_not_keep_children_from_their_start(self):
        self.app_with("import pathlib, sys\nsys.path += [pathlib.Path('here'), b'there']\n")
        self.worker("--concurrency", 1, app="opening", PYBGWORKER_START_METHOD="spawn")
        self.assertTrue(self.get(self.send("pids")))

    def test_a_slow_import_is_said_when_it_is_known_where_it_is_or_at_last(self):
        """On a busy machine the stack comes later than it is looked for."""
        for stacks, said_at in ((["in f"], 10), (["", "", "in f"], 12), ([""] * 99, 20)):
            log, said = mock.Mock(), []
            nursery = pybgworker.Nursery("app", log)
            nursery.process, nursery._line = mock.Mock(), mock.Mock()
            nursery.process.poll.return_value = None
            nursery._line.stack.side_effect = stacks
            starts = pybgworker.Starts(lambda text, **more: said.append(more["stack"]))
            child = mock.Mock(ready=False, began=0.0)
            child.read_stack.side_effect = stacks
            for at in range(said_at + 5):
                nursery.mind(at)
                starts.mention_slow([child], at)
                with self.subTest(stacks=stacks[-1], at=at):
                    self.assertEqual(log.call_count, int(at >= said_at))
                    self.assertEqual(len(said), int(at >= said_at))
            stack = stacks[-1] or None
            self.assertEqual((log.call_args[1]["stack"], said), (stack, [stack]))

    def test_a_death_that_a_busy_nursery_has_not_told_yet_is_no_closed_connection(self):
        if not Path("/proc/self/stat").exists():
            self.skipTest("needs /proc")
        self.app_with("""
            os.register_at_fork(before=lambda: time.sleep(0.4))
            @task(name="end", retries=0)
            def end(seconds): time.sleep(seconds); os.kill(os.getpid(), 8)
        """)
        worker = self.worker("--concurrency", 2, app="opening")
        until(lambda: len(worker.children()) == 3)
        time.sleep(0.5)                 # it forks no more
        for result in [self.send("end", 0.3), self.send("end", 0.5)]:
            self.assertIn("SIGFPE: arithmetic error", str(self.failure(result)))

    def test_an_import_that_takes_long_says_where_it_is(self):
        site = self.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import pybgworker\npybgworker.SLOW_SECONDS = 2\n")
        self.app_with("def wait_for_it():\n    while not os.path.exists('go'):\n"
                      "        time.sleep(0.01)\nwait_for_it()\n")
        worker = self.worker("--concurrency", 1, "--worker-name", "slow", app="opening",
                             PYTHONPATH=f"{site}:{HERE}")
        said = worker.wait_for("child_error", worker="slow")
        self.assertIn("not imported after 2 s", said["error"])
        self.assertIn("in wait_for_it", said["stack"])
        (self.folder / "go").touch()
        worker.wait_for("worker_ready")
        self.assertEqual(len(worker.all("child_error")), 1)

    def test_a_worker_whose_next_nursery_has_no_app_ends_with_the_reason(self):
        """In the end: an import may fail for want of what comes back."""
        if not Path("/proc/self/task").exists():
            self.skipTest("needs /proc")
        self.app_with("if os.path.exists('broken'):\n    raise ValueError('broken now')\n")
        worker = self.worker("--concurrency", 1, app="opening")
        self.get(self.send("pids"))
        (self.folder / "broken").touch()
        os.kill(worker.nursery(), signal.SIGKILL)
        worker.wait_for("child_error", error="a child could not start, it is tried again: "
                        "ValueError: broken now")
        (self.folder / "broken").unlink()
        self.get(self.send("pids"))
        (self.folder / "broken").touch()
        os.kill(worker.nursery(), signal.SIGKILL)
        self.assertEqual(worker.wait(40), 1)
        self.assertIn("ValueError: broken now", "".join(worker.errors))

    def test_a_child_that_cannot_be_forked_just_now_is_tried_again(self):
        self.app_with("""
            import pybgworker
            real = pybgworker.own_fork

            def own_fork():
                if not os.path.exists("enough"):
                    raise BlockingIOError(11, "no more processes")
                return real()

            pybgworker.own_fork = own_fork
        """)
        worker = self.worker("--concurrency", 1, app="opening")
        said = worker.wait_for("child_error")
        self.assertIn("no child can be started, it is tried again", said["error"])
        self.assertIn("no more processes", said["error"])
        (self.folder / "enough").touch()
        self.assertTrue(self.get(self.send("pids")))
        self.assertEqual(len(worker.all("child_error")), 1)

    def test_a_child_that_lacks_a_thread_or_memory_to_begin_with_is_tried_again(self):
        """Said once, and before the worker says that it is ready."""
        for what, stand_in in (
            ("start_thread", "raise RuntimeError(\"can't start new thread\")"),
            ("Surroundings", "raise MemoryError('not enough')"),
        ):
            self.app_with(f"""
                import pybgworker
                real = pybgworker.{what}

                def for_want(*args):
                    if not os.path.exists("enough"):
                        {stand_in}
                    return real(*args)

                pybgworker.{what} = for_want

                @task(name="wait", retries=0)
                async def wait(): return 7
            """)
            worker = self.worker("--concurrency", 1, app="opening")
            said = worker.wait_for("child_error")
            self.assertIn("no child can be started, it is tried again", said["error"])
            until(lambda worker=worker: len(worker.children()) == 0)
            self.assertEqual(worker.all("worker_ready"), [])
            (self.folder / "enough").touch()
            with self.subTest(what):
                self.assertEqual(self.get(self.send("wait")), 7)
                self.assertEqual(len(worker.all("child_error")), 1)
            worker.stop()
            (self.folder / "enough").unlink()

    def test_signals_to_all_processes_of_a_worker_are_for_the_worker(self):
        """As systemd sends them: what runs is finished."""
        if not Path("/proc/self/task").exists():
            self.skipTest("needs /proc")
        worker = self.worker("--concurrency", 1)
        result = self.tasks.hold.delay()
        self.wait_lines("held")
        for pid in (worker.nursery(), *worker.children(), worker.pid):
            os.kill(pid, signal.SIGTERM)
        worker.wait_for("worker_stopping")
        (self.folder / "go").touch()
        self.assertEqual(worker.wait(), 0)
        self.assertEqual(result.status, "success")

    def test_an_import_that_prints_a_megabyte_does_not_wait_for_its_reader(self):
        self.app_with("print('x' * 1_000_000)\nos.write(1, b'y' * 1_000_000)\n")
        worker = self.worker("--concurrency", 1, app="opening")
        self.assertTrue(self.get(self.send("pids")))
        for letter in "xy":
            until(lambda letter=letter: any(
                letter * 1000 in event["text"] for event in worker.all("output")))


# == Load =====================================================================


class PoolCase(Served):
    """Children of a pool without their processes."""

    def run_of(self, number, name="t", usual=0.0, priority=5, attempt=0, queue="q"):
        run = Run(number, name, queue, attempt, 3, 0, None, 0, None, "", priority)
        run.usual = usual
        return run

    def placement(self, seconds, most=None, size=1):
        """A Placement that knows runs of t to take so many seconds."""
        durations = pybgworker.Durations()
        for _ in range(1000):
            durations.learn("t", seconds)
        return pybgworker.Placement(size, most, durations)

    def ready_member(self, *runs, log=mock.Mock()):
        """A member whose pipe holds `runs`; the child has taken the first."""
        member = pybgworker.Member.__new__(pybgworker.Member)
        pipe = pybgworker.OutputPipe.__new__(pybgworker.OutputPipe)
        pipe.__dict__.update(fd=-2, is_mute=False, strays=False, _will_stray=False,
                             _listens=True, _lines=pybgworker.LineCutter())
        slot = pybgworker.Slot(log, time.monotonic())
        slot.begin(runs[0] if runs else None, slot.began)
        member.__dict__.update(
            waiting=pybgworker.collections.deque(runs), began=slot.began, done=0, slot=slot,
            pipe=pipe, wire=self.wire(), phase=Phase.READY, verdict=None, _kill_due=0.0,
            beside=pybgworker.Beside(log),
            behind=sum(run.usual for run in runs[1:]))
        for n, run in enumerate(runs):
            run.due = member.slot.began + sum(before.usual for before in runs[:n])

        def recall():
            back, member.behind = list(member.waiting)[1:], 0.0
            member.waiting = pybgworker.collections.deque(list(member.waiting)[:1])
            return back

        member.recall = recall
        return member

    def wire(self, **ends):
        """A WorkerEnd that nothing comes from but what is put into its buffer."""
        wire = pybgworker.WorkerEnd.__new__(pybgworker.WorkerEnd)
        wire.__dict__.update(_buffer=bytearray(), _is_deaf=False, read=lambda: True, _beside=(),
                             hang_up=mock.Mock(), **ends)
        return wire

    def answer(self, run, value=b"1"):
        """The message of a child that this run has succeeded."""
        return pybgworker._MESSAGE.pack(
            len(value), b"S", run.id, run.attempt, 1000, 0.1) + value

    def pool_of(self, *runs, size=1, **kinds):
        """A pool of one child that has taken the first of these runs, and it."""
        pool = pybgworker.Pool(None, size, self.app.settings, mock.Mock(), mock.Mock(),
                               None, pybgworker.Kinds(**kinds))
        pool.crew.starts.end()               # no other is started
        pool.crew.nursery = mock.Mock(failure=None, can_bear=False)
        return pool, self.add_member(pool, *runs)

    def add_member(self, pool, *runs):
        """Another child of this pool."""
        member = self.ready_member(*runs)
        end = pybgworker.Exit(None, "SIGKILL", 0)
        member.process = mock.Mock(pid=4711, exit=end, is_orphan=False, failure=None)
        for name in ("interrupt", "wait", "close", "mind_output", "read_output"):
            setattr(member, name, mock.Mock())
        member.read_stack = str
        pool.members.append(member)
        return member

    def begin_beside(self, member, *runs, is_coroutine=True, at=100.0):
        """The child has these in flight, in its threads or on its event loop."""
        for run in runs:
            member.beside.begin(run, is_coroutine, at)
        return member


class Loads(PoolCase):

    def test_what_is_due_is_known_without_a_look_at_the_others(self):
        """Each slot is named once, when its time has come, and never after its end."""
        beside = pybgworker.Beside(mock.Mock())
        runs = [self.run_of(n) for n in range(3)]
        for n, run in enumerate(runs):
            beside.begin(run, True, 100.0 + n)
        stall = pybgworker.STALL_SECONDS
        self.assertEqual(beside.next_due(), 100.0 + stall)
        beside.end(beside[0, 1])
        self.assertEqual(beside.next_due(), 101.0 + stall)
        self.assertEqual(beside.due(101.0), [])
        found = beside.due(101.0 + stall)
        self.assertEqual([slot.run for slot in found], [runs[1]])
        beside.note(105.0, *found)
        self.assertEqual([slot.run for slot in beside.due(110.0)], [runs[2], runs[1]])
        self.assertEqual((beside.due(110.0), beside.next_due()), ([], math.inf))

    def test_what_has_ended_takes_no_memory(self):
        """However far away its time limit is."""
        beside = pybgworker.Beside(mock.Mock())
        for n in range(5000):
            beside.begin(self.run_of(n), True, 1.0)
            slot = beside[n, 1]
            beside.note(1e9, slot)
            beside.end(slot)
        self.assertLess(len(beside._agenda), 200)
        self.assertEqual((len(beside), beside.coroutines), (0, 0))

    def test_the_first_that_is_to_be_killed_counts_and_an_end_takes_it_away(self):
        member = self.begin_beside(self.ready_member(), *map(self.run_of, range(3)))
        slots = member.slots()
        for slot, due in zip(slots, (9.0, 5.0, 7.0)):
            member.condemn(Verdict.CANCELLED, due, slot)
        self.assertEqual(member.kill_due, 5.0)
        for slot, due in (slots[1], 7.0), (slots[0], 7.0), (slots[2], 0.0):
            member.end(slot, 3.0)
            self.assertEqual((member.kill_due, member.able), (due, not due))
        member.condemn(Verdict.TIMEOUT, 4.0, slots[0])      # it is over
        self.assertEqual(member.kill_due, 0.0)

    def test_bytes_belong_to_the_only_run_in_flight_or_to_nobody(self):
        log = mock.Mock()
        def said():
            found = [(call.args[1] and call.args[1].id, call.kwargs["text"])
                     for call in log.call_args_list if call.args[0] == "output"]
            log.reset_mock()
            return found

        member = self.ready_member(log=log)
        member.written(b"idle\n")
        self.assertEqual(said(), [(None, "idle")])
        self.begin_beside(member, self.run_of(1))
        member.written(b"of one\n")
        self.assertEqual(said(), [(1, "of one")])
        self.begin_beside(member, self.run_of(2))
        member.written(b"of two\nrest")
        self.assertEqual(said(), [(None, "of two")])
        first, second = member.slots()
        self.assertEqual(member.finish(first), "of one\n")
        member.end(first, 101.0)
        self.assertEqual((member.finish(second), said()), ("rest", [(2, "rest")]))

    def test_the_pipe_is_read_once_it_is_clear_whose_it_is(self):
        stall = pybgworker.STALL_SECONDS
        member = self.ready_member()
        self.assertTrue(member.is_settled(0.0))
        self.begin_beside(member, self.run_of(1))
        self.assertFalse(member.is_settled(100.0 + stall / 2))
        self.assertTrue(member.is_settled(100.0 + stall))
        self.begin_beside(member, self.run_of(2))           # now it is nobody's
        self.assertTrue(member.is_settled(100.0))

    def test_frames_for_the_loop_are_read_back_from_a_socket_of_their_own(self):
        with contextlib.ExitStack() as ends:
            member = self.ready_member()
            del member.recall
            member.wire = pybgworker.WorkerEnd(ends, True)
            _, _, beside = member.wire.theirs()
            for n in range(3):
                self.assertTrue(member.send(self.run_of(n), 1.0))
                self.assertTrue(member.send_beside(self.run_of(10 + n), True, 1.0))
            taken = pybgworker.own_socket(os.dup(beside))
            ends.callback(taken.close)
            self.assertEqual(pybgworker.read_frame(taken.recv(1000))[0], 10)
            self.assertEqual([run.id for run in member.recall_untaken(2.0)], [11, 12])
            self.assertGreater(member.beside.shut_until, 2.0)
            self.assertEqual([run.id for run in member.runs()], [0, 1, 2, 10])
            self.assertEqual([run.id for run in member.recall()], [0, 1, 2])
            self.assertEqual(([run.id for run in member.runs()], member.beside.coroutines),
                             ([10], 1))
            self.assertEqual(member.recall_untaken(3.0), [])


# == Placement ================================================================


class Placing(PoolCase):

    def survey(self, *members, size=2, most=None, at=100.0, threads=1, coroutines=4):
        kinds = pybgworker.Kinds(threads, coroutines, {"c"})
        placement = pybgworker.Placement(size, most, pybgworker.Durations(), kinds)
        return placement.survey(members, at)

    def loaded(self, coroutines=0, threads=0, main=0, phase=Phase.READY, alone=False):
        """A child with so many runs of each kind in flight."""
        self.numbers = getattr(self, "numbers", itertools.count(1))
        def runs(count):
            found = [self.run_of(next(self.numbers)) for _ in range(count)]
            for run in found:
                run.alone = alone
            return found

        member = self.ready_member(*runs(main))
        self.begin_beside(member, *runs(coroutines))
        self.begin_beside(member, *runs(threads), is_coroutine=False)
        member.phase = phase
        return member

    def test_places_are_counted_by_kind_in_as_many_children_as_work_at_a_time(self):
        load = self.loaded
        for members, room, why in (
            ([load(), load(), load()], (2, 8, 2), "the third is the spare"),
            ([load(1), load(), load()], (2, 7, 2), "coroutines are beside"),
            ([load(4), load(4), load()], (2, 0, 1), "a full loop is no busy main thread"),
            ([load(4), load(main=1), load()], (1, 4, 1), "and the other way round"),
            ([load(main=1), load(main=1), load()], (0, 8, 1), "no third for ordinary ones"),
            ([load(1, alone=True), load(2), load()], (2, 5, 1), "the spare is for others"),
            ([load(1, alone=True), load(2)], (1, 2, 0), "nothing goes beside one alone"),
            ([load(main=1, alone=True), load(), load()], (1, 8, 1), "… on a main thread"),
            ([load(1, alone=True), load(1, alone=True), load()], (1, 4, 0),
             "one child is for those that need none for themselves"),
            ([load(phase=Phase.STARTING), load()], (1, 4, 1), "unless it is the only one"),
            ([load(1), load(2, phase=Phase.RETIRING), load()], (2, 5, 1),
             "whoever retires makes room for the spare, but not for more runs in all"),
            ([load(phase=Phase.STARTING)] * 3, (0, 0, 0), "none is ready"),
        ):
            free, _, *others = self.survey(*members).room
            with self.subTest(why):
                self.assertEqual((free, *others), room)

    def test_places_of_threads_are_no_places_in_pipes(self):
        load = self.loaded
        for members, room in (
            ([load(), load(), load()], (6, 0, 8, 2)),
            ([load(threads=3), load(threads=1), load()], (2, 0, 8, 1)),
            ([load(threads=3), load(threads=3), load()], (0, 0, 8, 1)),
            ([load(threads=3, coroutines=4), load(threads=3, coroutines=4), load()],
             (0, 0, 0, 0)),
            ([load(threads=1, alone=True), load(), load()], (5, 0, 8, 1)),
        ):
            places = self.survey(*members, threads=3)
            with self.subTest(room):
                self.assertEqual((places.room, places.takers, places.slack),
                                 (room, [], 0.0))

    def test_a_child_near_its_last_task_takes_no_more_than_that(self):
        member = self.loaded(coroutines=2)
        member.done = 5
        for most, beside in ((None, 2), (9, 2), (8, 1), (7, 0)):
            room = self.survey(member, size=1, most=most).room
            self.assertEqual((room.beside, room.free), (beside, int(beside > 0)))

    def test_a_loop_that_took_nothing_is_left_alone_for_a_while(self):
        member, other = self.loaded(), self.loaded()
        member.beside.shut_until = 101.0
        self.assertEqual(self.survey(member, other).room.beside, 4)
        self.assertEqual(self.survey(member, other, at=101.0).room.beside, 8)

    def test_who_has_the_fewest_comes_first(self):
        members = [self.loaded(3), self.loaded(1), self.loaded(2)]
        loops = self.survey(*members, size=3).loops
        self.assertEqual([pybgworker.heapq.heappop(loops)[0] for _ in range(3)], [1, 2, 3])
        members = [self.loaded(2), self.loaded(1), self.loaded(main=1)]
        taker = min(self.survey(*members, size=3).takers)
        self.assertIs(taker[-1], members[1])    # of the idle main threads

    def test_what_is_due_in_a_child_with_many_runs(self):
        """The nearest of all; and nothing that is over, or turns would never end."""
        stall, placement = pybgworker.STALL_SECONDS, self.placement(0.1)
        member = self.ready_member()
        self.assertEqual(placement.next_due(member), math.inf)
        self.begin_beside(member, self.run_of(1), self.run_of(2))
        self.assertEqual(placement.next_due(member), 100.0 + stall)
        slots = member.beside.due(100.0 + stall)
        self.assertEqual(placement.next_due(member), math.inf)
        member.beside.note(105.0, slots[0])
        member.condemn(Verdict.CANCELLED, 103.0, slots[1])
        self.assertEqual(placement.next_due(member), 103.0)
        member.beside.shut_until = 102.0
        self.assertEqual(placement.next_due(member), 102.0)
        member.beside.shut_until, member.phase = 0.0, Phase.RETIRING
        self.assertEqual(placement.next_due(member), 103.0)
        for slot in slots:
            member.end(slot, 102.5)
        self.assertEqual(placement.next_due(member), 0.0)       # it may leave


# == Crashes ==================================================================

CRASHES = """
    import ctypes, os, resource, signal, sys, threading, time

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]

    @task(retries=0)
    def rank(): return ctypes.string_at(0)

    @task(retries=0)
    def give_up(): os.abort()

    @task(retries=0)
    def free_twice():
        print("about to free")
        found = libc.malloc(64)
        libc.free(found)
        libc.free(found)

    @task(retries=0)
    def leave(code): os._exit(code)

    @task(retries=0)
    def exit(code): sys.exit(code)

    @task(retries=0)
    def hold():
        with open("pid", "w") as f:
            print(os.getpid(), file=f)
        until = time.monotonic() + 60
        while time.monotonic() < until and not os.path.exists("go"): time.sleep(0.01)

    @task(retries=0)
    def hungry(limit):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return len(bytearray(limit))

    @task(retries=0)
    def eat(size):
        kept = []
        while True:
            kept.append(bytearray(b"x") * (1 << 20))
            if len(kept) == size >> 20:
                return len(kept)

    @task(retries=0)
    def burn(seconds):
        until = time.process_time() + seconds
        while time.process_time() < until: pass
        raise KeyError("burnt")

    @task(retries=0, timeout=0.2)
    def too_long():
        while True:
            try: time.sleep(60)
            except BaseException: pass
"""


class Crashes(Served):
    """What killed a child, in one sentence: by real deaths, and by a table."""

    TASKS = CRASHES
    USED = r" \(peak \d+ MiB, (?:.*, )?CPU \d+\.\d s\)"

    def test_a_real_crash_says_what_it_was_and_where(self):
        worker, tasks = self.worker("--concurrency", 2), self.tasks
        results = [(tasks.rank.delay(), "SIGSEGV",
                    r"segmentation fault in rank at tasks\.py:10"),
                   (tasks.give_up.delay(), "SIGABRT", r"abort\(\) in give_up at tasks\.py:13"),
                   (tasks.leave.delay(3), None,
                    r"it ended its process with exit code 3, as by os\._exit\(\)")]
        for result, name, text in results:
            error = self.failure(result).error
            with self.subTest(text):
                self.assertEqual((error.kind, error.type), ("crash", name or ""))
                self.assertRegex(str(error), f"^{name or 'crash'}: {text}{self.USED}$")
                event = worker.wait_for("task_crash", task_id=result.id)
                self.assertEqual((event.get("signal"), event["error"]), (name, error.message))
                record, = self.store.attempts(result.id)
                self.assertEqual((record["signal"], record["error"]), (name, error.message))
                self.assertEqual(record["exit_code"], None if name else 3)
                self.assertGreater(record["peak"], 1 << 20)
                self.assertGreater(record["cpu"], 0)
                self.assertIn(error.message.split(" (")[0], self.cli("show", result.id).stdout)
                self.assertIn(error.message[:30], self.cli("list").stdout)

    @unittest.skipUnless(sys.platform == "linux", "glibc says so")
    def test_an_abort_says_what_the_c_library_printed(self):
        self.worker()
        error = self.failure(self.tasks.free_twice.delay()).error
        if "double free" not in (self.store.output(1) or ""):
            self.skipTest("this C library does not notice it, or says nothing")
        self.assertRegex(str(error), "^SIGABRT: abort\\(\\) in free_twice at tasks.py:20: "
                         f".*double free.*{self.USED}$")
        self.assertNotIn("about to", error.message)

    def test_an_exit_by_python_is_an_exception_and_costs_no_child(self):
        self.worker()
        error = self.failure(self.tasks.exit.delay(3)).error
        self.assertEqual((error.kind, str(error)), ("exception", "SystemExit: 3"))

    def test_a_kill_from_outside_is_called_so(self):
        self.worker()
        result = self.tasks.hold.delay()
        for number, name, text in (
            (signal.SIGKILL, "SIGKILL", "killed from outside, as by kill -9"),
            (signal.SIGXCPU, "SIGXCPU", r"its CPU time is used up \(RLIMIT_CPU\)"),
        ):
            os.kill(int(self.wait_lines("pid")[0]), number)
            (self.folder / "pid").unlink()
            with self.subTest(name):
                self.assertRegex(str(self.failure(result)), f"{name}: {text}")
            self.store.retry(result.id, self.store.now())
        self.assertEqual([record["signal"] for record in self.store.attempts(1)],
                         ["SIGKILL", "SIGXCPU"])

    def test_we_say_when_it_was_us(self):
        self.worker()
        self.assertRegex(str(self.failure(self.tasks.too_long.delay())),
                         f"timeout: killed after its limit of 0.2 s{self.USED}$")

    def test_a_want_of_addresses_is_said_with_the_limit(self):
        self.worker()
        error = self.failure(self.tasks.hungry.delay(1 << 30)).error
        self.assertRegex(str(error), r"^MemoryError: out of memory "
                         r"\(peak \d+ MiB, RLIMIT_AS 1.0 GiB\)$")

    def test_an_ordinary_failure_says_what_it_has_used(self):
        self.worker()
        self.failure(self.tasks.burn.delay(0.2))
        self.failure(self.tasks.burn.delay(0.0))
        long, short = (self.store.attempts(n)[0] for n in (1, 2))
        self.assertTrue(0.2 <= long["cpu"] < 5, long)
        self.assertLess(short["cpu"], 0.2)      # not that of the run before
        self.assertGreater(long["peak"], 1 << 20)

    def own_cgroup(self, limit):
        """A function to enter a cgroup of our own that may have so many bytes."""
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            top = Path("/sys/fs/cgroup") / ("memory" if kinds else "")
            name, value = ("memory.limit_in_bytes", limit) if kinds else \
                ("memory.max", limit)
            if kinds and "memory" not in kinds.split(","):
                continue
            folder = top / path.lstrip("/") / f"pybgworker-test-{os.getpid()}"
            try:
                folder.mkdir()
                self.addCleanup(folder.rmdir)
                (folder / name).write_text(str(value))
                return lambda f=folder: (f / "cgroup.procs").write_text(str(os.getpid()))
            except OSError:
                continue
        self.skipTest("there is no cgroup for memory that we may make one in")

    @unittest.skipUnless(Path("/proc/self/cgroup").exists(), "there are no cgroups here")
    def test_the_kernel_kills_for_want_of_memory_in_a_real_cgroup(self):
        worker = self.worker("--concurrency", 1, before=self.own_cgroup(256 << 20))
        eaten = self.tasks.eat.delay(1 << 30)
        error = self.failure(eaten).error
        self.assertRegex(
            str(error), r"^SIGKILL: out of memory \(peak \d\d\d MiB, "
            r"cgroup limit 256 MiB, cgroup oom_kill \+1, CPU \d+\.\d s\)$")
        held = self.tasks.hold.delay()      # and a kill after that is no such thing
        os.kill(int(self.wait_lines("pid")[0]), signal.SIGKILL)
        said = str(self.failure(held))
        self.assertRegex(said, "killed from outside, as by kill -9 .*oom_kill \\+0")
        self.assertEqual(worker.stop(), 0)

    def words(self, *end, scarcity=None, stack="", printed="", verdict=None, limit=None):
        with mock.patch.object(pybgworker, "address_limit", lambda: limit):
            found = pybgworker.crash_of(verdict, pybgworker.Exit(*end), 64 << 20, stack,
                                        printed, scarcity)
        return ": ".join(filter(None, (found["type"], found["message"])))

    def test_each_end_has_its_words(self):
        big, scarce = 3 << 30, pybgworker.Scarcity
        table = (
            (("SIGKILL", None, big, 7.25), {"scarcity": scarce("cgroup", 1, 4 << 30)},
             "SIGKILL: out of memory (peak 3.0 GiB, cgroup limit 4.0 GiB, cgroup oom_kill +1, "
             "CPU 7.2 s)"),
            (("SIGKILL", None, big), {"scarcity": scarce("machine", 2, None)},
             "SIGKILL: out of memory (peak 3.0 GiB, machine oom_kill +2, CPU 0.0 s)"),
            (("SIGKILL", None, big), {"scarcity": scarce("cgroup", 0, big)},
             "SIGKILL: killed from outside, as by kill -9 (peak 3.0 GiB, cgroup oom_kill +0, "
             "CPU 0.0 s)"),
            (("SIGKILL", None, big), {"scarcity": scarce("", 0, big + 1)},
             "SIGKILL: out of memory, it seems (peak 3.0 GiB, cgroup limit 3.0 GiB, CPU 0.0 s)"),
            (("SIGKILL", None, big), {},
             "SIGKILL: killed from outside, as by kill -9, or by the system for want of memory "
             "(peak 3.0 GiB, CPU 0.0 s)"),
            (("SIGKILL", None, 0), {},
             "SIGKILL: its nursery, the process that starts children, has ended, and this "
             "child with it"),
            (("SIGKILL", None, 0), {"scarcity": scarce("cgroup", 1, None)},
             "SIGKILL: its nursery, the process that starts children, has ended, and this "
             "child with it: out of memory (cgroup oom_kill +1)"),
            (("SIGSEGV", None, 0), {"stack": "Thread 0x1 (most recent call first):\n"
                                    '  File "a.py", line 3 in f'},     # no crash: asked for
             "SIGSEGV: segmentation fault"),
            (("SIGBUS", None, 95 << 20), {"limit": 100 << 20},
             "SIGBUS: bus error (peak 95 MiB, RLIMIT_AS 100 MiB, CPU 0.0 s)"),
            (("SIGBUS", None, 9 << 20), {"limit": 100 << 20},
             "SIGBUS: bus error (peak 9.0 MiB, CPU 0.0 s)"),
            (("signal 45", None, 0), {}, "signal 45: this signal ended the child"),
            (("SIGABRT", None, 0), {"printed": "free(): x\n1\n2\n3\n4\n5\n"},
             "SIGABRT: abort()"),                   # that was long before
            (("SIGABRT", None, 0), {"printed": "terminate called after throwing\n"
                                    "  what():  boom\nlast\n"},
             "SIGABRT: abort(): terminate called after throwing what():  boom"),
            ((None, 0, 0), {}, "it ended its process with exit code 0, as by os._exit()"),
            ((None, None, 0), {}, "its process has ended, and somebody else has waited for "
             "it: how it has ended is not known"),
            (("SIGKILL", None, 1 << 20), {"verdict": Verdict.MEMORY},
             "SIGKILL: it used more than max_memory, 64 MiB (peak 1.0 MiB, CPU 0.0 s)"),
        )
        for end, about, wanted in table:
            with self.subTest(wanted):
                self.assertEqual(self.words(*end, **about), wanted)

    def test_every_signal_that_ends_a_process_has_its_meaning(self):
        harmless = {"SIGCHLD", "SIGCLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU",
                    "SIGURG", "SIGWINCH", "SIGKILL"}
        rare = {"SIGIO", "SIGPOLL", "SIGPWR", "SIGSTKFLT", "SIGRTMIN", "SIGRTMAX", "SIGPIPE",
                "SIGUSR1", "SIGUSR2", "SIGEMT", "SIGINFO", "SIGIOT"}
        for number in signal.Signals:
            if number.name not in harmless | rare:
                self.assertIn(number.name, pybgworker.SIGNAL_WORDS)

    def test_the_place_is_the_innermost_that_is_not_pythons_own(self):
        own = os.path.dirname(os.__file__)
        frames = (f'{own}/ctypes/__init__.py", line 5 in string_at', 'app/x.py", line 88 in _rank',
                  'app/y.py", line 2 in <module>')

        def place(*frames, head="Fatal Python error: Segmentation fault\n\nCurrent thread 0x1 "
                  "(most recent call first):\n"):
            stack = head + "".join(f'  File "{frame}\n' for frame in frames)
            return self.words("SIGSEGV", None, 0, stack=stack).partition("fault")[2]

        self.assertEqual(place(*frames), " in _rank at x.py:88")
        self.assertEqual(place(frames[0]), " in string_at at __init__.py:5")
        self.assertEqual(place(f'{own}/site-packages/np/a.py", line 7 in dot', frames[1]),
                         " in dot at a.py:7")
        self.assertEqual(place(), "")
        others = 'Thread 0x2 (most recent call first):\n  File "z.py", line 1 in wait\n'
        self.assertEqual(place(frames[1], head="Fatal Python error: Aborted\n\nCurrent thread "
                               "0x1 [main] (most recent call first):\n"),
                         " in _rank at x.py:88")
        self.assertEqual(place(head=f"Fatal Python error: x\n\n{others}"), "")

    def test_who_is_charged_among_others_and_who_is_not_say_so(self):
        worker = self.worker("--threads", 3, "--concurrency", 1)
        held = self.tasks.hold.delay()
        self.wait_lines("pid")
        crashed = self.tasks.rank.delay()
        worker.wait_for("task_lost", task_id=held.id)
        (self.folder / "go").touch()
        error = self.failure(crashed).error
        self.assertIn("segmentation fault in rank", error.message)
        record = self.store.attempts(crashed.id)[0]
        self.assertEqual((record["outcome"], record["kind"], record["error"]), (
            "forgiven", "lost", pybgworker.LOST_WITH[False, True]))
        self.get(held)
        self.assertEqual(
            [(each["attempt"], each["outcome"], each["error"])
             for each in self.store.attempts(held.id)],
            [(1, "forgiven", pybgworker.LOST_WITH[False, True]), (2, "success", None)])


# == Deaths ===================================================================


class Deaths(PoolCase):

    def test_who_is_charged_with_the_end_of_a_child(self):
        """The run whose fault it is; where that is not known, none but a suspect."""
        for why, count, verdict, of, marked, charged, is_known in (
            ("one run in flight", 1, None, {}, (), {0}, True),
            ("a crash among others", 3, None, {}, (), set(), False),
            ("max_memory", 3, Verdict.MEMORY, {}, (), set(), False),
            ("nonsense", 2, Verdict.MAD, {}, (), set(), False),
            ("a time limit", 3, Verdict.STUCK, {1: Verdict.TIMEOUT}, (), {1}, True),
            ("two of them", 4, Verdict.STUCK,
             {1: Verdict.TIMEOUT, 2: Verdict.CANCELLED}, (), {1, 2}, True),
            ("it answered in the last moment", 2, Verdict.CANCELLED, {}, (), set(), True),
            ("nonsense in a grace", 2, Verdict.MAD, {1: Verdict.TIMEOUT}, (), set(), False),
            ("marked before", 3, None, {}, (2,), {2}, False),
        ):
            runs = [self.run_of(n) for n in range(count)]
            for n in marked:
                runs[n].alone = True
            member = self.begin_beside(self.ready_member(), *runs)
            member.verdict = verdict
            for n, on_run in of.items():
                member.condemn(on_run, 5.0, member.slot_of(n))
            blame = pybgworker.judge([member])
            with self.subTest(why):
                self.assertEqual({slot.run.id for slot in blame.culprits}, charged)
                self.assertEqual({run.id for run in blame.forgiven},
                                 set(range(count)) - charged)
                self.assertEqual(blame.is_known, is_known)

    def test_suspects_that_die_together_are_not_charged_but_in_the_end(self):
        """Each had a child to itself, and one of them may have killed their nursery."""
        for forgiven, charged in (((1, 1), set()), ((9, 9), set()), ((10, 1), {0}),
                                  ((10, 11), {0, 1}), ((1,), {0})):
            members = [self.begin_beside(self.ready_member(), self.run_of(99))]
            for n, times in enumerate(forgiven):
                run = self.run_of(n)
                run.alone, run.forgiven = True, times
                members.append(self.ready_member(run))
            blame = pybgworker.judge(members)
            with self.subTest(forgiven=forgiven):
                self.assertEqual({slot.run.id for slot in blame.culprits}, charged)
                self.assertEqual({run.id for run in blame.forgiven},
                                 {99, *range(len(forgiven))} - charged)

    def test_who_is_killed_with_others_again_and_again_gets_a_child_to_itself(self):
        """Else one that lasts longer than its neighbours' limits would never end."""
        culprit, *innocent = map(self.run_of, range(1, 6))
        for times, run in enumerate(innocent):
            run.forgiven = times
        pool, member = self.pool_of(coroutines=9, is_async={"t"})
        self.begin_beside(member, culprit, *innocent)
        member.condemn(Verdict.CANCELLED, 101.0, member.slot_of(culprit.id))
        pool._mark(member)
        pool.enforce(101.0)
        found = pool.collect()
        self.assertEqual([end.run for end in found.ended], [culprit])
        self.assertEqual(found.forgiven, innocent)
        self.assertEqual([run.alone for run in innocent], [False, False, False, True])
        lost = [call[1]["reason"] for call in pool._log.call_args_list
                if call[0][0] == "task_lost"]
        self.assertEqual(lost[2:], [pybgworker.LOST_WITH[True, False],
                                    pybgworker.LOST_WITH[True, True]])

    def test_who_blocks_the_loop_is_charged_when_its_child_has_to_be_killed(self):
        """Or one without a limit of its own would take its neighbours down for ever.

        Who came to its limit before that is charged, too: it does not heed it; who
        came there since then could not.
        """
        for timeout, ended, forgiven in ((2.0, {2: "crash"}, [1, 3]),
                                         (0.05, {1: "timeout", 2: "crash"}, [3])):
            pool, member = self.pool_of(coroutines=9, is_async={"t"})
            self.begin_beside(member, *map(self.run_of, (1, 2, 3)))
            limited = member.slot_of(1)
            limited.run.timeout = timeout
            member.wire._buffer += pybgworker.write_message(
                pybgworker.LAGGED, [1.5, "in f"], (2, 1))
            pool._hear(member, 101.6)
            member.condemn(Verdict.TIMEOUT, 103.0, limited)
            for at in (103.0, 103.5):
                pool._mark(member)
                pool.enforce(at)
            found = pool.collect()
            with self.subTest(timeout):
                self.assertEqual({end.run.id: end.kind for end in found.ended}, ended)
                self.assertIn("blocked the event loop",
                              found.ended[-1].error["message"])
                self.assertEqual([(run.id, run.alone) for run in found.forgiven],
                                 [(run_id, False) for run_id in forgiven])

    def test_a_loop_that_lags_is_said_once_a_minute_for_each_name(self):
        pool, member = self.pool_of(coroutines=9, is_async={"t", "u"})
        self.begin_beside(member, self.run_of(1), self.run_of(2), self.run_of(3, "u"))
        for at, number in ((102.0, 1), (103.0, 2), (104.0, 3), (161.9, 1), (162.0, 2)):
            member.wire._buffer += pybgworker.write_message(
                pybgworker.LAGGED, [1.5, "in f"], (number, 1))
            pool._hear(member, at)
        said = [call.args[1].id for call in pool._log.call_args_list
                if call.args[0] == "loop_lagged"]
        self.assertEqual(said, [1, 3, 2])

    def test_a_blocked_loop_gives_back_what_it_has_not_taken(self):
        """And whoever says something else of a loop is out of its mind."""
        pool, member = self.pool_of(coroutines=9, is_async={"t"})
        self.begin_beside(member, *map(self.run_of, (1, 2, 3)))
        member.recall = lambda: member.beside.recall({3})
        for value in ([1.5, "in f"], [1.5], [1.5, None], ["x", "in f"], [-1, "in f"], 7):
            member.verdict, member._kill_due = None, 0.0
            member.wire._buffer += pybgworker.write_message(
                pybgworker.LAGGED, value, (2, 1))
            pool._hear(member, 101.0)
            is_right = value == [1.5, "in f"]
            with self.subTest(value=value):
                self.assertIs(member.verdict, None if is_right else Verdict.MAD)
                self.assertEqual(member.beside.shut_until > 101.0, is_right)
        self.assertEqual([run.id for run in pool.hand.runs], [3])

    def test_a_loop_that_goes_on_blames_nobody(self):
        for how in ("answer", "print", "end"):
            pool, member = self.pool_of(coroutines=9, is_async={"t"})
            self.begin_beside(member, *map(self.run_of, (1, 2, 3)))
            member.wire._buffer += pybgworker.write_message(
                pybgworker.LAGGED, [1.5, "in f"], (2, 1))
            pool._hear(member, 101.6)
            self.assertEqual(member.beside.blocker.run.id, 2)
            kind, value, of = {"answer": (pybgworker.SUCCEEDED, "1", 1),
                               "print": (pybgworker.PRINTED, "x\n", 3),
                               "end": (pybgworker.SUCCEEDED, "1", 2)}[how]
            member.wire._buffer += pybgworker.write_message(kind, value, (of, 1))
            pool._hear(member, 102.0)
            with self.subTest(how):
                self.assertIsNone(member.beside.blocker)

    def test_a_loop_that_takes_a_frame_goes_on_and_one_that_takes_none_gets_none(self):
        for taken, blocker, has in ((True, None, [1, 9]), (False, 1, [1])):
            pool, member = self.pool_of(coroutines=9, is_async={"t"})
            self.begin_beside(member, self.run_of(1))
            member.beside.block(member.slot_of(1), 1.0, 101.0)
            self.begin_beside(member, self.run_of(9), at=102.0)
            member.wire.recall_beside = lambda: set() if taken else {9}
            for at in (102.02, 102.5):
                pool._mark(member)
                pool.enforce(at)
            with self.subTest(taken=taken):
                self.assertEqual([run.id for run in member.runs()], has)
                self.assertEqual(member.beside.blocker and 1, blocker)
                self.assertEqual(len(pool.hand), int(not taken))
                self.assertEqual(member.beside.shut_until > 102.5, not taken)

    def test_children_that_die_together_cost_nobody_a_run_at_first(self):
        """And the one that has brought its child down before, is charged."""
        pool, first = self.pool_of(self.run_of(1), size=3)
        self.add_member(pool, self.run_of(2))
        third = self.add_member(pool)
        first.wire._buffer += self.answer(first.waiting[0])
        alone = self.run_of(3)
        alone.alone = True
        self.begin_beside(third, alone)
        for member in pool.members:
            member.process.is_orphan = True
        first.wire.read = lambda: False
        pool._hear(first, 9.0)
        ended, forgiven, _ = pool.collect()
        self.assertEqual([(end.run.id, end.kind) for end in ended],
                         [(1, "success"), (3, "crash")])
        self.assertEqual([(run.id, run.alone) for run in forgiven], [(2, True)])
        self.assertEqual(pool.members, [])
        said = [call.kwargs for call in pool._log.call_args_list
                if call.args[0] == "child_error"]
        self.assertEqual([about["runs"] for about in said], [2])

    @unittest.skipUnless(Path("/proc/self/task").exists(), "needs /proc")
    def test_the_end_of_a_nursery_costs_no_run_that_was_one_of_many(self):
        """Each was in a child of its own, and may run only once."""
        worker = self.worker("--concurrency", 2)
        results = [self.tasks.nap.delay(1.5, f"n{i}") for i in range(2)]
        for i in range(2):
            self.wait_lines(f"n{i}")
        os.kill(worker.nursery(), signal.SIGKILL)
        self.assertEqual([self.get(result) for result in results], ["slept"] * 2)
        for result in results:
            row = self.store.task(result.id)
            self.assertEqual((row.attempt, row.forgiven), (2, 1))
        said = [event for event in worker.all("child_error") if "runs" in event]
        self.assertEqual([event["runs"] for event in said], [2])
        self.assertIn("its nursery, the process that starts children, has ended",
                      said[0]["error"])
        self.assertNotIn("memory", said[0]["error"])
        self.assertEqual(len(worker.all("task_lost")), 2)
        self.assertEqual(worker.stop(), 0)

    def test_who_is_charged_while_others_are_not_is_told_of_them(self):
        for why, marked, verdicts, text in (
            ("known", (), {1: Verdict.TIMEOUT}, "killed after its limit of 3 s; 2 other runs "
             "were in flight with it, and not to blame"),
            ("suspected", (1,), {}, "segmentation fault (peak 7.0 MiB, CPU 0.0 s); a child has "
             "died with it before; 2 other runs were in flight with it, and not to blame"),
        ):
            pool, member = self.pool_of(coroutines=9, is_async={"t"})
            self.begin_beside(member, *map(self.run_of, range(3)))
            member.process.exit = pybgworker.Exit("SIGSEGV", None, 7 << 20)
            for number, verdict in verdicts.items():
                member.slot_of(number).run.timeout = 3
                member.condemn(verdict, 101.0, member.slot_of(number))
                member.process.exit = pybgworker.Exit("SIGKILL", None, 0)
            for number in marked:
                member.slot_of(number).run.alone = True
            pool._bury(member, 101.0)
            found = pool.collect()
            with self.subTest(why):
                self.assertEqual([end.error["message"] for end in found.ended], [text])
                self.assertEqual(len(found.forgiven), 2)

    def test_one_line_says_a_death_and_one_each_what_it_costs(self):
        pool, member = self.pool_of(coroutines=9, is_async={"t"})
        self.begin_beside(member, *map(self.run_of, range(5)))
        member.process.exit = pybgworker.Exit("SIGSEGV", None, 7 << 20)
        pool._bury(member, 101.0)
        said = [call.args[0] for call in pool._log.call_args_list]
        self.assertEqual(said, ["child_error"] + ["task_lost"] * 5)
        about = pool._log.call_args_list[0].kwargs
        self.assertIn("with 5 runs in flight: SIGSEGV: segmentation fault", about["error"])
        self.assertEqual(about["runs"], 5)


# == Dispatch =================================================================


class Dispatching(PoolCase):

    def asyncs(self, count, first=1, alone=False):
        runs = [self.run_of(first + n, name="c") for n in range(count)]
        for run in runs:
            run.alone = alone
        return runs

    def pool(self, children=2, size=1, threads=1, coroutines=4):
        """A pool with a spare, and where it has sent what."""
        pool, member = self.pool_of(size=size, threads=threads, coroutines=coroutines,
                                    is_async={"c"})
        for _ in range(children - 1):
            self.add_member(pool)
        for each in pool.members:
            each.wire.send = each.wire.send_beside = lambda run, cell: True
        return pool

    def deal(self, pool, *runs):
        """Have these sent; return the ids that each child has, and those in hand."""
        pool.take(runs)
        pool.dispatch(pool.balance(100.0), 100.0)
        return ([[run.id for run in member.runs()] for member in pool.members],
                [run.id for run in pool.hand.runs])

    def test_coroutines_are_spread_and_none_is_sent_that_has_no_place(self):
        pool = self.pool(children=3, size=2)
        has, left = self.deal(pool, *self.asyncs(10))
        self.assertEqual((has, left), ([[1, 3, 5, 7], [2, 4, 6, 8], []], [9, 10]))

    def test_no_kind_waits_for_another(self):
        pool = self.pool()
        has, left = self.deal(pool, *self.asyncs(5), self.run_of(6), self.run_of(7))
        self.assertEqual((has, left), ([[6, 1, 2, 3, 4], []], [5, 7]))
        pool = self.pool(threads=2)
        has, left = self.deal(pool, *map(self.run_of, (1, 2, 3)), *self.asyncs(1, 4))
        self.assertEqual((has, left), ([[1, 2, 4], []], [3]))
        self.assertEqual(len(pool.members[0].waiting), 0)

    def test_a_run_that_is_to_be_alone_is_so_until_its_end(self):
        """In the spare child, if the others have something to do."""
        for kind in ("c", "t"):
            pool = self.pool()
            alone = self.run_of(9, name=kind)
            alone.alone = True
            has, left = self.deal(pool, *self.asyncs(2), alone)
            self.assertEqual((has, left), ([[1, 2], [9]], []))
            has, left = self.deal(pool, *self.asyncs(3, 11))
            self.assertEqual((has, left), ([[1, 2, 11, 12], [9]], [13]))

    def test_nothing_joins_or_waits_behind_one_that_is_alone(self):
        pool = self.pool(children=1)
        has, left = self.deal(pool, *self.asyncs(1, alone=True), *self.asyncs(1, 2),
                              self.run_of(3))
        self.assertEqual((has, left), ([[1]], [2, 3]))
        pool, member = self.pool_of()
        member.wire.send = lambda run, cell: True
        alone = self.run_of(1, usual=0.001)
        alone.alone = True
        pool.durations.learn("t", 0.001)
        has, left = self.deal(pool, alone, self.run_of(2))
        self.assertEqual((has, left), ([[1]], [2]))

    def test_one_that_is_alone_never_waits_behind_another(self):
        pool, member = self.pool_of()
        member.wire.send = lambda run, cell: True
        pool.durations.learn("t", 0.001)
        alone = self.run_of(2)
        alone.alone = True
        self.assertEqual(self.deal(pool, self.run_of(1), alone), ([[1]], [2]))

    def test_what_could_be_claimed_is_less_by_what_is_in_hand(self):
        pool = self.pool(size=2, children=3)
        places = pool.balance(100.0)
        self.assertEqual(pool.room(places), places.room)
        pool.hand.add([*self.asyncs(3), self.run_of(9)])
        room = pool.room(places)
        self.assertEqual((room.free, room.beside),
                         (places.room.free - 1, places.room.beside - 3))

    def test_a_coroutine_that_was_interrupted_leaves_its_child_as_it_was(self):
        """A thread, or the main one, may have left anything; and what it took is learnt."""
        for is_coroutine, phase in (True, Phase.READY), (False, Phase.RETIRING):
            for kind in "timeout", "cancelled":
                pool, member = self.pool_of(coroutines=9, threads=9,
                                            is_async={"t"} if is_coroutine else ())
                self.begin_beside(member, *map(self.run_of, (1, 2)),
                                  is_coroutine=is_coroutine)
                member.wire._buffer += pybgworker.write_message(
                    pybgworker.ENDED_BADLY, {"kind": kind}, (1, 1), 1000, 0.5)
                pool._hear(member, 101.0)
                with self.subTest(kind, is_coroutine=is_coroutine):
                    self.assertIs(member.phase, phase)
                    self.assertEqual(pool.durations.typical > 0, not is_coroutine)

    def test_children_that_wait_for_their_last_runs_are_replaced_but_not_without_end(self):
        pool, born = self.pool(children=3, size=2), []
        def bear(*_):
            born.append(1)
            return mock.Mock(phase=Phase.READY, beside={}, ready=True)

        pool.crew.nursery = mock.Mock(failure=None, can_bear=True)
        pool.crew.starts = pybgworker.Starts(lambda *_, **more: None)
        pool.crew._most_waned = 2
        with mock.patch.object(pybgworker, "Member", bear), \
                mock.patch.object(os, "cpu_count", lambda: 9):
            for retiring, count in ((0, 0), (1, 1), (2, 2), (3, 2)):
                for member in pool.members[:retiring]:
                    member.phase = Phase.RETIRING
                    member.beside[len(born), 1] = mock.Mock()
                pool.crew.fill(100.0)
                with self.subTest(retiring=retiring):
                    self.assertEqual(len(born), count)

    def test_urgent_coroutines_take_nothing_out_of_pipes(self):
        pool = self.pool()
        member = pool.members[0]
        member.waiting.extend([self.run_of(1), self.run_of(2)])
        urgent = self.run_of(3, name="c", priority=1)
        pool.take([urgent])
        self.assertEqual(len(member.waiting), 2)
        pool.take([self.run_of(4, priority=1)])
        self.assertEqual(len(member.waiting), 1)


# == Pool =====================================================================


class Pools(PoolCase):

    def test_children_that_cannot_start_are_given_up_until_one_can(self):
        starts = pybgworker.Starts(lambda *_, **more: None)
        for _ in range(4):
            starts.failed(0, "no memory")
        self.assertEqual((starts.given_up, starts.next_start), ("", 1.6))
        starts.failed(0, "no memory")
        self.assertEqual(starts.given_up, "no memory")

        starts.succeeded()
        self.assertEqual(starts.given_up, "")

    def test_nurseries_that_soon_die_are_started_later_each_time(self):
        starts, at, found = pybgworker.Starts(lambda *_: None), 100.0, []
        for lives in [1] * 12 + [11, 1, 1]:
            began = at
            while not starts.may_be_nursery(at):
                at += 0.1
            found.append(round(at - began, 1))
            at += lives
        self.assertEqual(found[:3], [0, 0, 0])
        self.assertEqual(found, [*sorted(found[:12]), found[12], 0, 0])
        self.assertLess(3, found[11])
        self.assertLessEqual(found[11], 5)
        starts.end()
        self.assertFalse(starts.may_be_nursery(at + 99))

    def test_a_lack_is_never_given_up_and_said_once(self):
        said = []
        starts = pybgworker.Starts(lambda text, **more: said.append(text))
        for _ in range(20):
            starts.lacked(0, "no more processes")
        self.assertEqual((starts.given_up, starts.next_start), ("", 5.0))
        self.assertEqual(said, ["no child can be started, it is tried again: "
                                "no more processes"])
        starts.succeeded()
        starts.lacked(0, "no memory")
        self.assertEqual(len(said), 2)
        for error, lacks in (
            (OSError(errno.EMFILE, ""), True), (OSError(errno.ENOENT, ""), False),
            (MemoryError(), True), (RuntimeError("can't start new thread"), True),
            (RuntimeError("no"), False), (BlockingIOError(errno.EAGAIN, ""), True),
        ):
            self.assertEqual(pybgworker.is_lack(error), lacks, error)

    def test_a_crash_while_no_spare_can_start_is_survived(self):
        """What was tried before the crash says nothing about now."""
        crashed = mock.Mock(ready=True, done=3, waiting=[1], began=100.0)
        for tell in ("failed", "lacked"):
            starts = pybgworker.Starts(lambda *_, **more: None)
            for _ in range(6):
                getattr(starts, tell)(100.0, "it dies")
            starts.ended(crashed, 100.5)
            self.assertEqual((starts.given_up, starts.next_start), ("", 100.5))
        broken = mock.Mock(ready=False, is_retiring=False, began=100.0, **{"has_lacked.return_value": False,
                                           "last_words.return_value": "it dies"})
        retired = mock.Mock(ready=True, is_retiring=True, done=0, waiting=[], began=100.0,
                            **{"has_lacked.return_value": False})
        for _ in range(5):      # it grew while it was idle, and was to be replaced
            starts.ended(retired, 100.8)
        self.assertEqual(starts.failures, 0)
        for _ in range(5):
            starts.ended(broken, 101.0)
        self.assertTrue(starts.given_up)
        starts.end()
        starts.ended(crashed, 102.0)
        self.assertEqual(starts.room([], 1e9), 0)

    def test_a_worker_that_lacks_something_waits_until_it_is_there(self):
        (self.folder / "poor.py").write_text(textwrap.dedent("""
            import errno, os, sys
            import pybgworker
            from pybgworker import task

            if "SEEN" not in os.environ:        # the nursery: for its second child
                os.environ["SEEN"] = "1"
                real, started = pybgworker.spawn, []

                def spawn(argv, *rest):
                    started.append("run_child" in str(argv))
                    if sum(started) > 2 and not os.path.exists("enough"):
                        raise OSError(errno.EMFILE, "too many open files")
                    return real(argv, *rest)

                pybgworker.spawn = spawn
            else:
                try:
                    open("memory", "x").close()
                except FileExistsError:
                    pass
                else:                           # the first child
                    raise MemoryError("in the child")

            @task(name="crash", retries=0)
            def crash(): os._exit(1)

            @task(name="pid", retries=0)
            def pid(): return os.getpid()
            """))
        send = pybgworker.default_app.send
        worker = self.worker("--concurrency", 1, "--start-method", "spawn", app="poor")
        self.assertTrue(self.get(send("pid", retries=0)))
        self.failure(send("crash", retries=0))
        worker.wait_for("child_error")
        after = send("pid", retries=0)
        (self.folder / "enough").touch()
        self.assertTrue(self.get(after))
        errors = [event["error"] for event in worker.all("child_error")]
        self.assertLessEqual(len(errors), 3)        # of a child, and of the worker
        self.assertRegex(errors[0], "(?s)tried again: .*(MemoryError|too many)")

    def test_a_child_that_takes_long_to_import_the_app_says_where_it_is(self):
        site = self.folder / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(
            "import pybgworker\npybgworker.SLOW_SECONDS = 4\n")
        (self.folder / "hanging.py").write_text(textwrap.dedent("""
            import os, sys, time
            from pybgworker import task

            def wait_for_the_other_service():
                while not os.path.exists("go"):
                    time.sleep(0.01)

            if "SEEN" in os.environ:            # a child
                wait_for_the_other_service()
            os.environ["SEEN"] = "1"

            @task(name="crash", retries=0)
            def crash(): os._exit(1)
            """))
        worker = self.worker("--concurrency", 1, "--start-method", "spawn", app="hanging",
                             PYTHONPATH=f"{site}:{HERE}")
        said = worker.wait_for("child_error")
        self.assertIn("imports the app", said["error"])
        self.assertIn("in wait_for_the_other_service", said["stack"])
        self.assertEqual(worker.all("worker_ready"), [])
        (self.folder / "go").touch()
        worker.wait_for("worker_ready")
        failed = self.failure(pybgworker.default_app.send("crash", retries=0))
        self.assertNotIn("wait_for_the_other_service", failed.traceback or "")
        pids = [event["pid"] for event in worker.all("child_error")]
        self.assertEqual(len(pids), len(set(pids)))         # once of each

    def test_children_are_started_few_at_a_time(self):
        """As many as import at once on this machine; one that hangs blocks nobody."""
        starts, at = pybgworker.Starts(lambda *_, **more: None), 100.0
        ready = mock.Mock(ready=True, began=at)
        importing = mock.Mock(ready=False, began=at)
        with mock.patch("os.cpu_count", return_value=3):
            self.assertEqual(starts.room([], at), 4)
            self.assertEqual(starts.room([ready] * 9 + [importing] * 3, at), 1)
            self.assertEqual(starts.room([importing] * 9, at + 1.9), 0)
            self.assertEqual(starts.room([importing] * 9, at + 2), 4)
        starts.end()
        starts.failed(at, "it died")
        self.assertEqual(starts.room([], at + 1000), 0)

    def test_a_stop_is_heeded_while_children_are_started(self):
        """No more are begun; and those there are need not all get ready first."""
        (self.folder / "slow.py").write_text(textwrap.dedent("""
            import os, sys, time
            from pybgworker import task

            if "SEEN" in os.environ:            # a child
                with open("begun", "a") as f:
                    f.write("x\\n")
                while not os.path.exists("go"):
                    time.sleep(0.01)
            os.environ["SEEN"] = "1"

            @task
            def t(): pass
        """))
        worker = self.worker("--concurrency", 200, "--start-method", "spawn", app="slow")
        few = (os.cpu_count() or 1) + 1
        self.wait_lines("begun", few)
        self.assertLessEqual(len(self.lines("begun")), 2 * few)
        began = time.monotonic()
        self.assertEqual(worker.stop(), 0)
        self.assertLess(time.monotonic() - began, 4)
        self.assertLessEqual(len(self.lines("begun")), 4 * few)

    def test_all_children_are_started_in_the_end(self):
        worker = self.worker("--concurrency", 7)
        worker.wait_for("worker_ready")
        naps = [self.tasks.nap.delay(30, f"n{i}") for i in range(7)]
        for i in range(7):
            self.wait_lines(f"n{i}")
        for result in naps:
            result.cancel()
        self.assertEqual(worker.stop(), 0)

    @unittest.skipUnless(Path("/proc/self/statm").exists(), "needs /proc")
    def test_a_memory_limit_below_the_app_itself_ends_the_worker(self):
        """It would replace its children for ever, and say nothing."""
        worker = self.worker("--max-memory", "2m")
        self.assertEqual(worker.wait(), 1)
        self.assertRegex("".join(worker.errors), r"children cannot start:\nmax_memory is 2 "
                         r"MiB, and to import the app alone takes \d+ MiB\n")

    def test_a_task_on_its_last_attempt_never_waits_in_a_pipe(self):
        """So a worker killed with full pipes fails nothing that did not start."""
        self.tasks.once.delay_many([("warm",)] * 50)
        first = self.worker("--concurrency", 2)
        until(lambda: len(self.lines("ran")) == 50)
        self.tasks.nap.delay(30, "a")
        self.tasks.nap.delay(30, "b")
        results = self.tasks.once.delay_many([(str(n),) for n in range(50)])
        self.wait_lines("a")
        self.wait_lines("b")
        first.kill()
        self.worker("--concurrency", 2, "--burst").wait()

        self.assertEqual({r.status for r in results}, {"success"})

    def test_what_waits_in_a_dead_childs_pipe_is_not_charged(self):
        results = self.tasks.started.delay_many([(n,) for n in range(300)])
        crash = self.tasks.die.options(priority=6).delay("kill")
        self.worker("--concurrency", 1)
        self.failure(crash)

        self.assertEqual([self.get(r) for r in results], list(range(300)))
        self.assertEqual({r.attempt for r in results}, {1})

    def test_a_child_gets_no_more_tasks_than_it_may_run(self):
        """However short they are, and however many could wait in its pipe."""
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 3)
        results = self.tasks.my_pid.delay_many([()] * 31)
        pids = [self.get(result) for result in results]
        self.assertEqual(max(map(pids.count, pids)), 3)
        self.assertEqual({r.attempt for r in results}, {1})
        worker.stop()

    def test_a_child_is_replaced_after_so_many_tasks(self):
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 2)
        pids = [self.get(self.tasks.fork_twice.delay()) for _ in range(6)]
        self.assertLessEqual(max(map(pids.count, pids)), 2)
        worker.stop()

    @unittest.skipUnless(Path("/proc/self/statm").exists(), "needs /proc")
    def test_a_result_that_the_worker_has_no_memory_for_costs_its_own_run(self):
        (self.folder / "small.py").write_text(textwrap.dedent("""
            import resource, sys
            from pybgworker import task

            # Not for the children: the worker is to lack memory.
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)

            @task(name="big", retries=1, retry_delay=0)
            def big(n): return "x" * n

            @task(name="small", retries=0)
            def small(): return 1
        """))
        big = self.app.send("big", 60_000_000, retries=1)
        small = [self.app.send("small") for _ in range(5)]
        resource = pybgworker.resource
        limit = 160 << 20, resource.RLIM_INFINITY
        worker = self.worker("--concurrency", 1, app="small",
                             before=lambda: resource.setrlimit(resource.RLIMIT_AS, limit))
        self.assertEqual([self.get(result) for result in small], [1] * 5)
        failed = self.failure(big)
        self.assertRegex(str(failed), "memory|MemoryError")
        self.assertLessEqual(big.attempt, 2)
        self.assertEqual(worker.stop(), 0)

    def test_a_worker_on_a_file_that_is_no_database_ends_with_one_line(self):
        (self.folder / "garbage").write_text("garbage " * 1000)
        worker = self.worker("--db", "garbage")
        self.assertEqual(worker.wait(), 1)
        self.assertEqual(len(worker.errors), 1)
        self.assertIn("it is some other file", worker.errors[0])

    def test_a_task_over_the_memory_limit_is_killed(self):
        self.worker("--concurrency", 1, "--max-memory", "150m")
        (self.folder / "eat.py").write_text("")
        failed = self.failure(self.tasks.eat.delay())

        self.assertEqual(failed.kind, "crash")
        self.assertIn("max_memory, 150 MiB", str(failed))

    def test_random_messages_of_a_child_never_get_past_the_pool(self):
        chance = random.Random(6)
        limits = self.app.settings
        head = pybgworker._MESSAGE
        bodies = (b"null", b"[]", b"{}", b"[" * 100_000, b'{"kind":"crash"}', b"\xff\xfe",
                  b'{"kind":"exception","countdown":NaN}', b'{"kind":["a"]}', b"1" * 5000,
                  b'{"kind":"exception","countdown":1e999,"retryable":true}',
                  b'{"kind":"exception","message":[1],"traceback":{},"retryable":[]}')
        journal = pybgworker.Journal(Log(os.open(os.devnull, os.O_WRONLY)), "w")
        said = 0
        for _ in range(6000):
            nursery = mock.Mock(failure=None, can_bear=False)
            pool = pybgworker.Pool(nursery, 1, limits, journal.run, None)
            pool.crew.starts.end()
            member = self.ready_member(self.run_of(7), log=journal.run)
            member.recall, member.crash = list, -1
            message = bytearray()
            for _ in range(chance.randrange(1, 4)):
                body = chance.choice(bodies)
                message += head.pack(
                    len(body), chance.choice((b"R", b"B", b"S", b"F", b"F", b"O", b"P", b"x")),
                    chance.choice((7, 7, 7, 8, -1)), chance.choice((1, 1, 1, 2)),
                    chance.choice((0, 1, 1, 1, 1 << 60, (1 << 64) - 1)),
                    chance.choice((0.1,) * 9 + (-1.0, 1e300, float("nan"), float("inf")))
                ) + body
            for _ in range(chance.choice((0, 0, 1, 5))):
                message[chance.randrange(len(message))] = chance.randrange(256)
            member.wire._buffer = message
            pool._hear(member, 1)
            for end in pool._ended:
                said += 1
                outcome = pybgworker.settle(end, RetryPolicy(), 1, 0.5)
                journal.death(end)
                journal.outcome(outcome)
                self.assertLess(outcome.run_at or 0, 1 << 53)
                self.assertLess(outcome.duration, 1 << 53)
        self.assertGreater(said, 100)

    def test_a_retry_in_an_infinite_time_does_not_end_the_worker(self):
        worker = self.worker("--concurrency", 1)
        results = [self.tasks.retry_in.delay(text) for text in ("inf", "nan", "1e300")]
        waits = []
        for result in results:
            until(lambda result=result: result.status == "retrying")
            waits.append(self.store.task(result.id).run_at - pybgworker.now_ms())
        self.assertLess(waits[1], 2000)             # its own retry_delay
        self.assertGreater(min(waits[0], waits[2]), 10**11)
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
        self.assertEqual(worker.all("task_crash"), [])

    def test_a_child_gone_mad_costs_its_own_run(self):
        self.worker("--concurrency", 1)
        for how in ("noise", "length", "stranger", "no error", "no time"):
            with self.subTest(how):
                failed = self.failure(self.tasks.scribble.delay(how))
                self.assertEqual(failed.kind, "crash")
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)

    def test_a_claimed_run_that_has_not_begun_is_cancelled_at_once(self):
        """In hand, or behind another in a pipe; the one that runs is interrupted."""
        pool, member = self.pool_of(self.run_of(1), self.run_of(2), self.run_of(3))
        pool.hand.add([self.run_of(4)])
        for number in (4, 2):
            pool.cancel(number, 5.0)
            with self.subTest(number):
                self.assertEqual([(end.run.id, end.kind) for end in pool._ended],
                                 [(number, "cancelled")])
                self.assertEqual((member.why, member.kill_due), (None, 0.0))
            pool._ended.clear()
        self.assertEqual([run.id for run in pool.hand.runs], [3])
        pool.cancel(1, 5.0)
        self.assertEqual((pool._ended, member.why), ([], Verdict.CANCELLED))
        member.interrupt.assert_called_once_with(1)

    def test_a_run_that_is_cancelled_is_so_whatever_it_raises_and_not_if_it_succeeds(self):
        for error, kind in (None, "success"), ({"kind": "exception"}, "cancelled"):
            pool, member = self.pool_of(self.run_of(1))
            pool.cancel(1, 5.0)
            said = (pybgworker.ENDED_BADLY, error) if error else (pybgworker.SUCCEEDED, "1")
            member.wire._buffer += pybgworker.write_message(*said, (1, 1), 1000, 0.5)
            pool._hear(member, 6.0)
            self.assertEqual([end.kind for end in pool._ended], [kind])
            self.assertEqual((member.why, member.is_retiring), (None, kind == "cancelled"))

    def test_a_pool_wants_to_be_asked_again_when_something_is_due_in_it(self):
        """Or a time limit is as late as the next poll."""
        stall = 100.0 + pybgworker.STALL_SECONDS
        for why, of_run, of_member, due in (
            ("nothing", {}, {}, float("inf")),
            ("a time limit", {"timeout": 9.0}, {}, 109.0),
            ("it begins to be slow", {"timeout": 9.0}, {}, stall),
            ("its output is not listened to", {}, {"_listens": False}, stall),
            ("a kill", {"timeout": 1.0}, {"_kill_due": 103.0}, 103.0),
        ):
            run = self.run_of(1)
            pool, member = self.pool_of(run)
            member.slot.began = 100.0
            member.slot.announced = None if "slow" in why else run
            for of, values in ((run, of_run), (member, of_member)):
                for name, value in values.items():
                    setattr(of if name != "_listens" else member.pipe, name, value)
            with self.subTest(why):
                pool._mark(member)
                self.assertEqual(pool.next_timer(), due)
        pool.hand.add([self.run_of(2)])
        pool.hand._held[pool.hand.runs[0]] = 100.5
        self.assertEqual(pool.next_timer(), 100.5 + pybgworker._HAND_SECONDS)
        pool.hand.empty()
        member._kill_due, behind = 0.0, self.run_of(3)
        behind.due = 100.0
        member.waiting.append(behind)
        pool._mark(member)
        self.assertEqual(pool.next_timer(), pool.placement.late_from(member))

    def test_what_changes_in_one_child_is_due_in_time_without_a_look_at_the_others(self):
        first, second = self.run_of(1), self.run_of(2)
        pool, member = self.pool_of(first, second)
        second.timeout, looks, member.behind = 0.005, [], 0.0
        other = self.ready_member()
        other.mind_output = looks.append
        pool.members.append(other)
        member.wire._buffer += pybgworker._MESSAGE.pack(4, b"S", 1, 1, 1, 0.5) + b"null"
        pool.receive([(member, -1)], 200.0)
        self.assertEqual([run.id for run in member.waiting], [2])
        self.assertEqual(pool.next_timer(), 200.005)
        pool.enforce(200.004)
        self.assertEqual((looks, member.why), ([], None))
        with mock.patch.object(pybgworker.Member, "mind_output"):
            del other.mind_output
            pool.enforce(200.006)
        self.assertEqual(member.why, Verdict.TIMEOUT)
        self.assertEqual(pool.next_timer(), member.kill_due)
        pool.cancel(2, 201.0)
        pool._retire(other)
        self.assertEqual(pool.next_timer(), 0.0)        # it is asked to leave, now

    def test_a_time_limit_is_minded_in_a_child_from_which_all_was_recalled(self):
        first, second = self.run_of(1), self.run_of(2)
        pool, member = self.pool_of(first, second)
        at, urgent = member.slot.began, self.run_of(3, priority=1)
        urgent.timeout, member.wire.send = 9.0, lambda *_: True
        pool.durations.short_names.add(urgent.name)
        for run in (first, second):
            pool.durations.learn(run.name, 0.001)
        places = pool.balance(at)
        self.assertEqual([has for _, has, *_ in places.takers], [2])

        def recall():           # it has not begun the first
            back, member.waiting = list(member.waiting), pybgworker.collections.deque()
            return back

        member.recall = recall
        pool.take([urgent])
        pool.hand.take(lambda run: run is not urgent)
        pool.dispatch(places, at)
        self.assertEqual(list(member.waiting), [urgent])
        self.assertEqual(pool.next_timer(), at + 9)

    def test_what_stays_too_long_is_ended_step_by_step(self):
        """Interrupted by its child, dumped, killed; or asked to leave, then killed."""
        run = self.run_of(1)
        pool, member = self.pool_of(run)
        run.timeout, began = 2.0, member.slot.began
        pool._mark(member)
        steps, send = [], member.process.signal
        for seconds in (1.9, 2.0, 2.0 + pybgworker._TIMEOUT_GRACE - 0.01):
            pool.enforce(began + seconds)
            steps.append(member.why)
        self.assertEqual(steps, [None, Verdict.TIMEOUT, Verdict.TIMEOUT])
        send.assert_not_called()
        at = member.kill_due
        self.assertEqual(at, began + 2.0 + pybgworker._TIMEOUT_GRACE)
        pool.enforce(at)
        send.assert_called_once_with(signal.SIGUSR2)
        pool.enforce(at + pybgworker._STACK_GRACE / 2)
        self.assertEqual(pool._ended, [])
        pool.enforce(at + pybgworker._STACK_GRACE)
        self.assertEqual([end.kind for end in pool._ended], ["timeout"])
        self.assertEqual((pool.members, pool.next_timer()), ([], float("inf")))

        pool, member = self.pool_of()
        pool._retire(member)
        pool.enforce(5.0)
        member.wire.hang_up.assert_called_once_with()
        self.assertEqual((member.phase, member.why, member.kill_due),
                         (Phase.LEAVING, None, 5.0 + pybgworker.EXIT_GRACE))

    def test_what_waits_behind_a_run_that_is_to_be_killed_begins_elsewhere(self):
        def limit(pool, member):
            member.waiting[0].timeout = 0.5
            pool._mark(member)
            pool.enforce(member.slot.began + 1)

        def memory(pool, member):
            self.app.settings.max_memory = 1 << 20
            with mock.patch.object(pybgworker, "memory_bytes", return_value=1 << 30):
                pool.check_memory(1.0)

        def noise(pool, member):
            member.wire._buffer += b"\xff" * 500
            pool._hear(member, 1.0)

        for condemn in (limit, memory, noise):
            pool, member = self.pool_of(self.run_of(1), self.run_of(2))
            condemn(pool, member)
            with self.subTest(condemn.__name__):
                self.assertTrue(member.why and member.kill_due)
                self.assertEqual([run.id for run in member.waiting], [1])
                self.assertEqual([run.id for run in pool.hand.runs], [2])

    def test_a_child_that_died_without_a_word_is_described_in_words(self):
        _, member = self.pool_of()
        member._reason = ""
        for how, words in (((None, 1, 0), "exit code 1"), (("SIGSEGV", None, 0), "SIGSEGV")):
            member.process.exit = pybgworker.Exit(*how)
            self.assertEqual(member.last_words(), f"it died at once: {words}")

    def test_a_child_over_its_memory_is_replaced_killed_or_gives_the_reason(self):
        for phase, runs, after, why, reason in (
            (Phase.READY, (), Phase.RETIRING, None, False),
            (Phase.READY, (self.run_of(1),), Phase.READY, Verdict.MEMORY, False),
            (Phase.STARTING, (), Phase.STARTING, Verdict.MEMORY, True),
            (Phase.LEAVING, (), Phase.LEAVING, None, False),
        ):
            pool, member = self.pool_of(*runs)
            member.phase, self.app.settings.max_memory = phase, 1 << 20
            with mock.patch.object(pybgworker, "memory_bytes", return_value=1 << 30):
                pool.check_memory(1.0)
            with self.subTest(phase, runs=runs):
                self.assertEqual((member.phase, member.why), (after, why))
                self.assertEqual(bool(getattr(member, "_reason", "")), reason)

    def test_a_child_with_many_runs_over_its_memory_waits_for_them_unless_it_grows_on(self):
        limit = 100 << 20
        for taken, phase, after, why in (
            (100, Phase.READY, Phase.READY, None),
            (101, Phase.READY, Phase.RETIRING, None),
            (125, Phase.RETIRING, Phase.RETIRING, None),
            (126, Phase.READY, Phase.READY, Verdict.MEMORY),
            (126, Phase.RETIRING, Phase.RETIRING, Verdict.MEMORY),
        ):
            pool, member = self.pool_of(coroutines=9, is_async={"t"})
            self.begin_beside(member, *map(self.run_of, (1, 2)))
            member.phase, self.app.settings.max_memory = phase, limit
            with mock.patch.object(pybgworker, "memory_bytes", return_value=taken << 20):
                pool.check_memory(101.0)
            with self.subTest(taken=taken, phase=phase):
                self.assertEqual((member.phase, member.why), (after, why))

    def test_the_last_of_many_runs_in_a_child_over_its_memory_is_killed_like_a_lone_one(self):
        self.app.settings.max_memory = 100 << 20
        pool, member = self.pool_of()
        self.begin_beside(member, *map(self.run_of, (1, 2)))
        with mock.patch.object(pybgworker, "memory_bytes", return_value=101 << 20):
            pool.check_memory(101.0)
            self.assertEqual((member.phase, member.why), (Phase.RETIRING, None))
            member.end(member.slots()[0], 101.0)
            pool.check_memory(102.0)
        self.assertEqual(member.why, Verdict.MEMORY)

    def test_an_answer_sent_just_before_a_child_ended_counts(self):
        for why, end in (
            (Verdict.CANCELLED, lambda pool, member: pool.enforce(9.0)),
            (Verdict.STUCK, lambda pool, member: pool.enforce(9.0)),
            (None, lambda pool, member: pool.notice_deaths(9.0)),
            (None, lambda pool, member: pool.interrupt(9.0)),
        ):
            run = self.run_of(1)
            pool, member = self.pool_of(run)
            if why:
                member.condemn(why, 1.0)
            pool._mark(member)
            member.wire._buffer += self.answer(run)
            end(pool, member)
            with self.subTest(why):
                self.assertEqual([(end.run.id, end.kind, end.result)
                                  for end in pool._ended], [(1, "success", "1")])
                self.assertEqual(pool.members, [])

    def test_a_child_that_died_while_it_was_heard_is_not_listened_to_any_more(self):
        pool, member = self.pool_of(self.run_of(1))
        member.wire.read = lambda: False
        pool.receive([(member, -1)], 9.0)
        self.assertEqual(([end.kind for end in pool._ended], pool.members), (["crash"], []))
        member.mind_output.assert_not_called()

    def test_all_that_a_child_took_and_has_not_answered_ends_with_it(self):
        """It went mad, say, and read on: what came after that was not heard.

        Whose fault it was is not known, so none is charged; each runs by itself next.
        """
        runs = [self.run_of(n) for n in (1, 2, 3)]
        pool, member = self.pool_of(*runs)
        member.recall = list
        pool._condemn(member, Verdict.MAD, 5.0)
        pool.enforce(6.0)
        ended, forgiven, _ = pool.collect()
        self.assertEqual((ended, forgiven), ([], runs))
        self.assertEqual([run.alone for run in runs], [True] * 3)
        self.assertEqual((pool.members, pool.in_hand()), ([], 0))

    def test_a_child_may_take_the_second_frame_while_the_first_is_read_back(self):
        """Its answer is heard, then: it is the run at the head."""
        first, second = self.run_of(1), self.run_of(2)
        pool, member = self.pool_of(first, second)
        del member.recall
        member.wire.recall = lambda: {1}
        member.slot.verdict = Verdict.TIMEOUT
        pool._recall(member)
        self.assertEqual((list(pool.hand.runs), list(member.waiting)), ([first], [second]))
        self.assertEqual((member.slot.run, member.why), (second, None))
        member.wire._buffer += self.answer(second)
        pool._hear(member, 9.0)
        self.assertEqual([(end.run, end.kind) for end in pool._ended],
                         [(second, "success")])
        self.assertEqual(member.why, None)

    def test_a_run_that_had_not_begun_takes_its_verdict_along(self):
        run = self.run_of(1)
        run.timeout = 1.0
        pool, member = self.pool_of(run)
        del member.recall                       # nothing was taken
        member.wire.recall = lambda: {1}
        member.slot.began = 0.0
        pool._enforce_on(member, 5.0)
        self.assertEqual((list(pool.hand.runs), member.kill_due, member.why),
                         ([run], 0.0, None))

    def test_a_child_whose_run_ends_within_its_grace_is_not_killed(self):
        for why, kill_due in ((Verdict.TIMEOUT, 0.0), (Verdict.CANCELLED, 0.0),
                              (Verdict.MEMORY, 7.0)):
            run = self.run_of(1)
            pool, member = self.pool_of(run)
            pool._condemn(member, why, 5.0, 2.0)
            pool._condemn(member, Verdict.MAD, 5.5)       # the first sentence stands
            self.assertEqual((member.why, member.kill_due), (why, 7.0))
            member.wire._buffer += self.answer(run)
            pool._hear(member, 6.0)
            with self.subTest(why):
                self.assertEqual([end.kind for end in pool._ended], ["success"])
                self.assertEqual((member.why, member.kill_due),
                                 (why if kill_due else None, kill_due))

    def test_a_cancelled_task_that_does_not_listen_is_killed(self):
        self.worker("--concurrency", 1)
        result = self.tasks.deaf.delay()
        self.wait_lines("deaf")
        asked_at = time.monotonic()
        result.cancel()

        self.assertRaises(pybgworker.TaskCancelled, self.get, result)
        self.assertLess(time.monotonic() - asked_at, 1.5)

    def test_what_may_wait_in_a_pipe_and_how_many(self):
        """By the time until it would begin, as far as past runs tell."""
        for usual, waits, age, slow, room, why in (
            (0.0001, 1, 0.001, False, 127, "no-ops fill the pipe"),
            (0.0001, 1, 0.03, True, 0, "one of them takes far too long"),
            (0.01, 1, 0.0, False, 4, "50 ms of work"),
            (0.01, 3, 0.0, False, 2, "30 of them are there already"),
            (0.01, 1, 0.035, True, 0, "late by more than the stall"),
            (0.1, 1, 0.0, False, 0, "it has just begun"),
            (0.1, 1, 0.06, False, 1, "it will be over in 40 ms"),
            (0.1, 2, 0.06, False, 0, "one is enough"),
            (0.1, 1, 0.13, True, 0, "it should be over"),
            (2.0, 1, 1.99, True, 0, "nobody waits for long ones"),
        ):
            placement = self.placement(usual)
            member = self.ready_member(*(self.run_of(n, usual=usual)
                                         for n in range(waits)))
            at = member.slot.began + age
            places = placement.survey([member], at)
            with self.subTest(why):
                self.assertEqual(places.takers == [], slow)
                self.assertEqual(places.room, (0, room, 0, 0))
                self.assertEqual(room > 0, any(
                    placement.may_wait(self.run_of(9), pybgworker.NO_CELL, delay, has, taker)
                    for delay, has, _, taker in places.takers))

    def test_a_run_leaves_the_hand_in_its_own_time_though_others_go_one_by_one(self):
        hand, at = pybgworker.Hand(), 100.0
        hand.add([self.run_of(number) for number in range(5)])
        takes = iter([True] + [False] * 4)
        self.assertEqual(hand.deal(lambda run: next(takes), at), [])
        hand.add([self.run_of(9)])
        self.assertEqual(hand.due, 0.05)        # of one that was never dealt: now
        takes = iter([True] + [False] * 4)
        self.assertEqual(hand.deal(lambda run: next(takes), at + 0.03), [])
        self.assertEqual(hand.due, at + 0.05)
        takes = iter([True] + [False] * 3)
        back = hand.deal(lambda run: next(takes), at + 0.051)
        self.assertEqual([run.id for run in back], [3, 4])
        self.assertEqual([run.id for run in hand.runs], [9])
        hand.put_in_front(back)                 # and recalled, it begins anew
        self.assertEqual(hand.deal(lambda run: False, at + 0.06), [])

    def test_when_runs_get_slower_what_waits_is_too_much(self):
        """Each is only a little late, and the head never by the stall."""
        was, now = self.placement(0.0001), self.placement(0.015)
        member = self.ready_member(*(self.run_of(n, usual=0.0001) for n in range(100)))
        member.slot.began += 0.06
        at = member.slot.began + 0.015
        self.assertTrue(was.survey([member], at).takers)
        self.assertEqual(was.survey([member], at).overloaded(False), [])
        self.assertEqual(now.survey([member], at).takers, [])
        self.assertEqual(now.survey([member], at).overloaded(False), [member])
        member.recall()
        self.assertTrue(now.survey([member], at).takers)

    def test_what_waits_is_forgotten_with_what_is_recalled(self):
        """Also when the head itself had not begun: the child is idle, then."""
        ours, theirs = pybgworker.frame_pair()
        for end in (ours, theirs):
            self.addCleanup(end.close)
        member = self.ready_member()
        del member.recall
        member.wire = self.wire(_frames=ours, _unread=theirs)
        for count in (1, 3):
            for number in range(count):
                self.assertTrue(member.send(self.run_of(number + 1, usual=0.1), 5.0))
            self.assertAlmostEqual(member.behind, 0.1 * (count - 1))
            self.assertEqual(len(member.recall()), count)
            self.assertEqual((member.behind, len(member.waiting)), (0.0, 0))
        for number in range(8):
            member.send(self.run_of(number + 1, usual=0.1), 5.0)
        for _ in range(8):
            member.begin_next(6.0)
            self.assertGreaterEqual(member.behind, 0.0)
        self.assertEqual(member.behind, 0.0)

    def test_the_last_attempt_and_a_child_near_its_end_let_nothing_wait(self):
        placement, member = self.placement(0.0001, most=7), self.ready_member(
            self.run_of(1))
        member.done = 5
        self.assertTrue(placement.may_wait(self.run_of(2), pybgworker.NO_CELL, 0.0, 1, member))
        last = self.run_of(3, attempt=3)
        self.assertFalse(placement.may_wait(last, pybgworker.NO_CELL, 0.0, 1, member))
        self.assertTrue(placement.may_wait(last, 0, 0.0, 1, member))
        room = placement.survey([member], member.slot.began).room
        self.assertEqual(room, (0, 1, 0, 0))                            # of 7
        member.done = 6
        self.assertFalse(placement.may_wait(self.run_of(2), pybgworker.NO_CELL, 0.0, 1, member))

    def test_what_runs_for_the_last_time_waits_in_a_pipe_if_it_has_a_cell(self):
        for cells, sent in ((None, 1), (2, 2), (9, 3)):
            pool, member = self.pool_of()
            member.phase = Phase.READY
            member.wire.send = lambda run, cell: seen.append(cell) or True
            seen, begun = [], pool.crew.begun
            if cells:
                begun.open(self.store.path, 1, cells)
                self.addCleanup(begun.remove)
            if cells and begun.fd < 0:
                self.skipTest("no cells on this file system")
            pool.durations = self.placement(0.0001)._durations
            pool.placement = self.placement(0.0001)
            pool.hand.add([self.run_of(n, attempt=3) for n in (1, 2, 3)])
            pool.dispatch(pool.balance(1.0), 1.0)
            with self.subTest(cells):
                self.assertEqual(len(pool.hand), 3 - sent)
                self.assertEqual(seen, [0, 1, 2][:sent] if cells
                                 else [pybgworker.NO_CELL])

    def test_who_is_idle_soonest_comes_first_and_idle_ones_before_all(self):
        placement = self.placement(0.01, size=4)
        idle, late = self.ready_member(), self.ready_member(self.run_of(1, usual=0.01))
        two = self.ready_member(self.run_of(2, usual=0.01), self.run_of(3, usual=0.01))
        late.slot.began = two.slot.began - 0.015
        takers = placement.survey([two, late, idle], two.slot.began).takers
        order = [pybgworker.heapq.heappop(takers)[-1] for _ in range(3)]
        self.assertEqual([id(m) for m in order], [id(idle), id(late), id(two)])
        for members, slack in (([two, late], 0.0), ([two, idle], 0.0), ([], 0.0),
                               ([two], 0.02)):
            found = placement.survey(members, two.slot.began).slack
            self.assertAlmostEqual(found, slack)

    def test_the_spare_child_is_idle_while_the_others_work(self):
        """One more than work at a time: it is warm, and takes over from a dead one."""
        placement = self.placement(0.1, size=2)
        spare, busy = self.ready_member(), self.ready_member(self.run_of(1, usual=0.1))
        leaving = self.ready_member(self.run_of(2, usual=0.1))
        leaving.phase = Phase.RETIRING
        at = busy.slot.began
        for members, room in (([busy, spare, spare], (1, 0)), ([busy, busy, spare], (0, 0)),
                              ([busy, leaving, spare], (0, 0)), ([leaving, spare], (1, 0))):
            places = placement.survey(members, at)
            with self.subTest(room=room, children=len(members)):
                self.assertEqual(places.room, (*room, 0, room[0]))
                self.assertEqual([m is spare for _, has, _, m in places.takers if not has],
                                 [True] * room[0])

    def test_room_is_taken_by_idle_children_first(self):
        for runs, left in ((0, (2, 3)), (1, (1, 3)), (2, (0, 3)), (4, (0, 1)), (9, (0, 0))):
            self.assertEqual(pybgworker.Room(2, 3).less(runs), (*left, 0, 0))
        for taken, left in (((3, 0), (0, 0, 5, 3)), ((0, 2), (2, 1, 3, 4)),
                            ((1, 9), (1, 1, 0, 0))):
            self.assertEqual(pybgworker.Room(2, 1, 5, 6).less(*taken), left)

    def test_what_waits_longer_than_a_moment_goes_to_an_idle_child(self):
        placement = self.placement(0.01, size=2)
        busy = self.ready_member(self.run_of(1, usual=0.01), self.run_of(2, usual=0.01))
        idle, at = self.ready_member(), busy.slot.began
        def overloaded(members, is_spare=True):
            return placement.survey(members, at).overloaded(is_spare)

        self.assertEqual(overloaded([busy, idle]), [busy])
        self.assertEqual(overloaded([busy, idle], is_spare=False), [])
        self.assertEqual(overloaded([busy, busy]), [])
        longer = self.ready_member(self.run_of(3, usual=0.9))
        self.assertEqual(overloaded([busy, longer, idle], True), [])    # two work
        placement._size = 3
        self.assertEqual(overloaded([busy, longer, idle]), [busy])
        for run in busy.waiting:
            run.usual = 0.0001
        busy.behind = 0.0001
        self.assertEqual(overloaded([busy, idle]), [])

    def test_what_is_urgent_or_of_a_paused_queue_is_sorted_out_of_the_pipes(self):
        def run(number, priority=5, queue="q"):
            return self.run_of(number, priority=priority, queue=queue)

        pool = pybgworker.Pool(None, 2, self.app.settings, None, None)
        pool.members = [self.ready_member(run(1), run(2), run(3)),
                        self.ready_member(run(4), run(5, queue="paused"))]
        pool.take([run(6)])
        self.assertEqual([r.id for r in pool.hand.runs], [6])        # as urgent as they
        pool.take([run(7, priority=1)])
        self.assertEqual([r.id for r in pool.hand.runs][0], 7)
        self.assertEqual({r.id for r in pool.hand.runs}, {7, 6, 2, 3, 5})
        self.assertEqual([r.id for r in pool.take_back({"paused"})], [5])
        self.assertEqual({r.id for r in pool.make_way(1)}, {6, 2, 3})
        self.assertEqual([r.id for r in pool.hand.runs], [7])
        self.assertEqual([len(m.waiting) for m in pool.members], [1, 1])

        pool.hand.empty()
        pool.members = [self.ready_member(run(1, 1), run(2, 2), run(3, 9))]
        self.assertEqual([r.id for r in pool.make_way(4)], [3])
        self.assertEqual([r.id for r in pool.hand.runs], [2])

    def test_durations_decide_what_may_wait_in_a_pipe(self):
        durations = pybgworker.Durations()
        for seconds, is_short in ((0.0001, True), (0.9, True), (1.0, False)):
            durations.learn("t", seconds)
            self.assertEqual("t" in durations.short_names, is_short)
            self.assertGreaterEqual(durations.usual("t"), seconds)  # a long one at once
        durations.learn("t", 0.0001)
        self.assertIn("t", durations.short_names)
        self.assertEqual(durations.usual("new"), 0.0)
        self.assertNotIn("new", durations.short_names)


Served_TASKS_MORE = """
    @task(retries=0)
    def eat():
        held = []
        while True:
            held.append(bytearray(10_000_000))
            time.sleep(0.02)

    @task(retries=0)
    def scribble(how):
        place = sys._getframe(1).f_locals["self"]
        head, of = pybgworker._MESSAGE, (current_task().id, current_task().attempt)
        frames = {
            "noise": b"\\xff" * 500,
            "length": head.pack(1 << 31, b"S", 1, 1, 0, 0),
            "stranger": head.pack(0, b"S", 12345, 1, 0, 0),
            "no error": head.pack(2, b"F", *of, 0, 0) + b"[]",
            "no time": head.pack(0, b"S", *of, 1 << 63, 0),
        }
        place._wire.messages.sendall(frames[how])
        time.sleep(20)

    @task
    def retry_in(seconds):
        retry = Retry()
        retry.countdown = float(seconds)        # past the check of Retry()
        raise retry

    import multiprocessing

    @task(retries=0)
    def terminate(how):
        process = multiprocessing.get_context("fork").Process(
            target=time.sleep, args=(60,))
        process.start()
        getattr(process, how)()
        process.join(10)
        return process.exitcode

    @task(retries=0)
    def pool_of_two():
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(int(2).__rpow__, range(3))

    @task(retries=0)
    def fork_and_exit(how):
        pid = os.fork()
        if pid:
            return os.WEXITSTATUS(os.waitpid(pid, 0)[1])
        if how == "raise":
            raise ValueError("in the fork")
        sys.exit(how)

    @task(retries=0)
    def check_false():
        try:
            subprocess.check_call(["false"])
        except subprocess.CalledProcessError:
            return "raised"

    @task(retries=0)
    def signal_state():
        return [sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
                int(signal.getsignal(signal.SIGCHLD)), int(signal.getsignal(signal.SIGPIPE))]

    @task(timeout=0.1)
    def abort_at_timeout():
        try:
            time.sleep(10)
        except pybgworker.TaskTimeout:
            raise Abort("half done")

    @task
    def abort_from():
        try:
            1 / 0
        except ZeroDivisionError as exc:
            raise Abort("no use") from exc

    @task(retries=0)
    def deaf():
        mark("deaf")
        while True:
            try:
                time.sleep(10)
            except pybgworker.TaskCancelled:
                pass
"""
TASKS += Served_TASKS_MORE


NEIGHBOURS = """
    import asyncio, ctypes, os, signal, sys, time
    from pathlib import Path

    def mark(name, text=""):
        with open(name, "a") as f:
            f.write(f"{text}\\n")

    def crash():
        sys.stdout.flush()
        ctypes.string_at(0)

    @task(retries=0)
    async def wait(seconds, name="begun"):
        mark(name, current_task().id)
        await asyncio.sleep(seconds)
        return current_task().attempt

    @task(retries=0)
    def block(seconds, name="begun"):
        mark(name, current_task().id)
        time.sleep(seconds)
        return current_task().attempt

    @task(retries=0)
    async def wait_for(name):
        mark("begun", os.getpid())
        while not os.path.exists(name):
            await asyncio.sleep(0.01)
        return current_task().attempt

    @task(retries=0)
    def block_for(name):
        mark("begun", os.getpid())
        while not os.path.exists(name):
            time.sleep(0.01)
        return current_task().attempt

    @task(retries=1, retry_delay=0)
    async def crash_async(neighbours):
        while len(Path("begun").read_text().split()) < neighbours:
            await asyncio.sleep(0.01)
        crash()

    @task(retries=1, retry_delay=0)
    def crash_sync(neighbours):
        while len(Path("begun").read_text().split()) < neighbours:
            time.sleep(0.01)
        crash()

    def dig(depth):
        if depth:
            return dig(depth - 1)
        mark("begun", depth)
        time.sleep(30 if current_task().attempt == 1 else 0)

    @task(retries=0)
    def block_deep(depth):
        dig(depth)

    @task(retries=0)
    async def deaf_async():
        mark("deaf")
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                pass

    @task(retries=0)
    def deaf_sync():
        mark("deaf")
        while True:
            try:
                while True:
                    time.sleep(0.01)
            except BaseException:
                pass

    @task(retries=0)
    async def hold_up(seconds):
        mark("holds", os.getpid())
        time.sleep(seconds)

    @task(retries=0)
    async def leave_one():
        asyncio.ensure_future(deaf_async.fn())
        await asyncio.sleep(0)
        return os.getpid()

    @task(retries=0)
    async def pid():
        await asyncio.sleep(0.01)
        return os.getpid()
"""


class Neighbours(Served):
    """Many runs in one child, in its threads or on its event loop."""

    TASKS = NEIGHBOURS
    KINDS = {"coroutines": ("--coroutines", 100), "threads": ("--threads", 50)}

    def each_kind(self):
        """(kind, flags of a worker, its tasks that wait, wait for a file, crash, are deaf)
        """
        tasks = self.tasks
        for kind, many in self.KINDS.items():
            for name in ("begun", "deaf", "holds", "go"):
                (self.folder / name).unlink(missing_ok=True)
            own = (tasks.wait, tasks.wait_for, tasks.crash_async, tasks.deaf_async) \
                if kind == "coroutines" else \
                (tasks.block, tasks.block_for, tasks.crash_sync, tasks.deaf_sync)
            with self.subTest(kind):
                yield ("--concurrency", 1, *many), *own

    def charged(self, result):
        """Attempts that count."""
        row = self.store.task(result.id)
        return row.attempt - row.forgiven

    def test_one_that_always_crashes_costs_its_neighbours_nothing(self):
        """Though they may run only once; and itself it fails when its retries are used.
        """
        for flags, wait, _, crash, _ in self.each_kind():
            first = wait.delay_many([(0.1,)] * 20)
            culprit = crash.delay(30)
            results = first + wait.delay_many([(0.1,)] * 79)
            worker = self.worker(*flags)
            failed = self.failure(culprit)
            self.assertEqual((failed.kind, self.charged(culprit)), ("crash", 2))
            for result in results:
                self.get(result)
            self.assertEqual({self.charged(result) for result in results}, {1})
            said = worker.find("child_error")
            self.assertGreater(said["runs"], 20)
            self.assertIn("runs in flight: SIGSEGV: segmentation fault",
                          said["error"])
            lost = {event["task_id"] for event in worker.all("task_lost")}
            self.assertEqual(len(lost), said["runs"])
            self.assertEqual(len(worker.all("child_error")), 1)     # of the first death
            self.assertEqual(worker.stop(), 0)

    def test_a_kill_for_one_time_limit_costs_the_neighbours_nothing(self):
        for flags, _, wait_for, _, deaf in self.each_kind():
            results = [wait_for.delay("go") for _ in range(5)]
            worker = self.worker(*flags)
            self.wait_lines("begun", 5)
            culprit = deaf.options(timeout=0.3).delay()
            failed = self.failure(culprit)
            self.assertEqual((failed.kind, self.charged(culprit)), ("timeout", 1))
            self.wait_lines("begun", 10)
            again = self.lines("begun")[5:]
            self.assertEqual(len(set(again)), 1)        # together, in another child
            self.assertNotIn(again[0], self.lines("begun")[:5])
            (self.folder / "go").touch()
            self.assertEqual({self.get(result) for result in results}, {2})
            self.assertEqual({self.charged(result) for result in results}, {1})
            reasons = {event["reason"] for event in worker.all("task_lost")}
            self.assertEqual(reasons, {pybgworker.LOST_WITH[True, False]})
            self.assertEqual(worker.all("child_error"), [])
            self.assertEqual(worker.stop(), 0)

    def test_a_crash_among_more_stacks_than_a_pipe_holds_ends_the_child(self):
        """Nobody reads them while it writes them: it must not wait for that."""
        results = [self.tasks.block_deep.delay(90) for _ in range(40)]
        culprit = self.tasks.crash_sync.options(retries=0).delay(40)
        worker = self.worker("--concurrency", 1, "--threads", 50)
        self.assertEqual(self.failure(culprit).kind, "crash")
        for result in results:
            self.get(result)
        self.assertIn("Segmentation", worker.find("child_error")["stack"])
        self.assertEqual(worker.stop(), 0)

    def test_a_kill_for_one_cancellation_costs_the_neighbours_nothing(self):
        for flags, _, wait_for, _, deaf in self.each_kind():
            results = [wait_for.delay("go") for _ in range(5)]
            worker = self.worker(*flags)
            culprit = deaf.delay()
            self.wait_lines("begun", 5)
            self.wait_lines("deaf")
            asked_at = time.monotonic()
            culprit.cancel()
            until(culprit.ready)
            self.assertLess(time.monotonic() - asked_at, 5)
            self.assertEqual(culprit.status, "cancelled")
            (self.folder / "go").touch()
            self.assertEqual({self.get(result) for result in results}, {2})
            self.assertEqual({self.charged(result) for result in results}, {1})
            self.assertEqual(worker.stop(), 0)

    def test_a_limit_that_is_heeded_costs_no_child(self):
        for flags, _, wait_for, *_ in self.each_kind():
            neighbour = wait_for.delay("go")
            worker = self.worker(*flags)
            limited = [wait_for.options(timeout=0.2).delay("never") for _ in range(5)]
            self.assertEqual({self.failure(result).kind for result in limited}, {"timeout"})
            (self.folder / "go").touch()
            self.assertEqual(self.get(neighbour), 1)
            self.assertEqual(worker.all("task_lost"), [])
            self.assertEqual(worker.stop(), 0)

    def test_who_blocks_the_loop_is_named_and_charged_if_that_costs_a_child(self):
        neighbour = self.tasks.wait_for.delay("go")
        worker = self.worker("--concurrency", 1)
        self.wait_lines("begun")
        blocker = self.tasks.hold_up.delay(60)
        said = worker.wait_for("loop_lagged")
        self.assertEqual(said["task_id"], blocker.id)
        self.assertIn("in hold_up", said["stack"])
        self.assertGreaterEqual(said["seconds"], 1)
        self.tasks.wait.delay(0)            # it is not kept from others by that
        limited = self.tasks.wait_for.options(timeout=0.5).delay("never")
        neighbour.cancel()
        failed = self.failure(blocker)
        self.assertIn("blocked the event loop", str(failed))
        until(neighbour.ready)
        self.assertEqual(neighbour.status, "cancelled")
        self.assertEqual(self.failure(limited).kind, "timeout")
        self.assertEqual(self.charged(blocker), 1)
        self.assertEqual(worker.stop(), 0)

    def test_what_the_loop_does_not_take_goes_to_another_child(self):
        worker = self.worker("--concurrency", 2, "--coroutines", 3)
        worker.wait_for("worker_ready")
        self.tasks.hold_up.delay(20)
        self.wait_lines("holds")
        began = time.monotonic()
        results = self.tasks.pid.delay_many([()] * 10)
        pids = {self.get(result) for result in results}
        self.assertLess(time.monotonic() - began, 8)
        self.assertNotIn(int(self.lines("holds")[0]), pids)
        self.assertEqual({result.attempt for result in results}, {1})

    def test_no_kind_of_task_waits_for_the_places_of_another(self):
        for flags, waits, others in (
            (("--coroutines", 2), self.tasks.wait_for, self.tasks.block),
            ((), self.tasks.block_for, self.tasks.wait),
            (("--threads", 2), self.tasks.block_for, self.tasks.wait),
        ):
            for name in ("begun", "go"):
                (self.folder / name).unlink(missing_ok=True)
            worker = self.worker("--concurrency", 1, *flags)
            held = waits.delay_many([("go",)] * 30)
            self.wait_lines("begun", len(flags) or 1)
            began = time.monotonic()
            for result in others.delay_many([(0, "others")] * 20):
                self.get(result)
            with self.subTest(flags):
                self.assertLess(time.monotonic() - began, 8)
                self.assertLessEqual(len(self.lines("begun")), len(flags) or 1)
            (self.folder / "go").touch()
            for result in held:
                self.get(result)
            self.assertEqual(worker.stop(), 0)

    def test_no_more_run_at_a_time_than_there_are_places(self):
        for flags, wait, *_ in (
            (("--concurrency", 2, "--coroutines", 3), self.tasks.wait),
            (("--concurrency", 2, "--threads", 3), self.tasks.block),
        ):
            worker = self.worker(*flags)
            results = wait.delay_many([(0.05,)] * 60)
            for result in results:
                self.get(result)
            worker.stop()
            most = now = 0
            for event in worker.events:
                now += (event["event"] == "task_start") - (event["event"] == "task_success")
                most = max(most, now)
            with self.subTest(flags):
                self.assertLessEqual(most, 6)
                self.assertGreater(most, 3)

    def test_a_child_with_many_at_once_runs_no_more_than_it_may(self):
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 7)
        results = self.tasks.pid.delay_many([()] * 50)
        pids = collections.Counter(self.get(result) for result in results)
        self.assertLessEqual(max(pids.values()), 7)
        self.assertEqual({result.attempt for result in results}, {1})
        self.assertEqual(worker.stop(), 0)

    def test_a_long_one_does_not_keep_its_child_from_being_replaced(self):
        """A child that may take no more waits for its runs; another works meanwhile."""
        worker = self.worker("--concurrency", 1, "--max-tasks-per-child", 5)
        long = self.tasks.wait_for.delay("go")
        self.wait_lines("begun")
        for result in self.tasks.pid.delay_many([()] * 20):
            self.get(result)
        self.assertEqual(long.status, "running")
        (self.folder / "go").touch()
        self.assertEqual(self.get(long), 1)
        self.assertEqual(worker.stop(), 0)

    def test_a_child_in_which_something_goes_on_is_replaced(self):
        worker = self.worker("--concurrency", 1)
        long = self.tasks.wait_for.delay("go")
        result = self.tasks.leave_one.delay()
        before = self.get(result)
        self.assertNotEqual(self.get(self.tasks.pid.delay()), before)
        said = worker.wait_for("child_error", task_id=result.id)
        self.assertIn("leave_one has left asyncio tasks that do not end", said["error"])
        self.assertEqual(long.status, "running")
        (self.folder / "go").touch()
        self.assertEqual(self.get(long), 1)
        until(lambda: before not in worker.children(), what="the end of that child")
        self.assertEqual(len(worker.all("child_error")), 1)
        self.assertEqual(worker.stop(), 0)

    def test_long_runs_in_children_that_retire_keep_nobody_waiting(self):
        """As many children as there are places may each be left with a long run."""
        worker = self.worker("--threads", 6, "--concurrency", 1,
                             "--max-tasks-per-child", 2)
        long = []
        for n in range(5):
            long.append(self.tasks.block_for.delay("go"))
            self.wait_lines("begun", 2 * n + 1)
            self.get(self.tasks.block.delay(0), timeout=10)
        self.assertEqual({result.status for result in long}, {"running"})
        (self.folder / "go").touch()
        for result in long:
            self.get(result)
        self.assertEqual(worker.stop(), 0)

    def test_a_stop_waits_for_all_that_run(self):
        for flags, wait, *_ in self.each_kind():
            worker = self.worker(*flags)
            results = wait.delay_many([(1.0,)] * 20)
            self.wait_lines("begun", 20)
            self.assertEqual(worker.stop(), 0)
            self.assertEqual({result.status for result in results}, {"success"})
            said = worker.find("worker_stopping")
            self.assertEqual((said["running"], len(said["tasks"])), (20, 20))

    def test_what_a_stop_does_not_wait_for_is_handed_back_as_it_was(self):
        for flags, _, wait_for, *_ in self.each_kind():
            worker = self.worker(*flags, "--shutdown-timeout", "0.2")
            results = wait_for.delay_many([("go",)] * 20)
            self.wait_lines("begun", 20)
            self.assertEqual(worker.stop(), 0)
            self.assertEqual(worker.find("worker_stop")["handed_back"], 20)
            self.assertEqual({result.status for result in results}, {"queued"})
            (self.folder / "go").touch()
            self.worker(*flags, "--burst").wait()
            self.assertEqual({self.get(result) for result in results}, {2})
            self.assertEqual({self.charged(result) for result in results}, {1})

    @unittest.skipUnless(Path("/proc/self/statm").exists(), "needs /proc")
    def test_no_child_outlives_a_worker_that_was_killed_with_many_runs(self):
        for flags, _, wait_for, *_ in self.each_kind():
            worker = self.worker(*flags)
            wait_for.delay_many([("go",)] * 10)
            pids = {int(pid) for pid in self.wait_lines("begun", 10)}
            worker.kill()
            until(lambda pids=pids: not any(map(is_alive, pids)), 3)
            self.sql("delete from bg_task")

    def test_two_hundred_that_wait_take_little_longer_than_one(self):
        """Also the first time; and they are read of, not only done, by then."""
        worker = self.worker("--concurrency", 2)
        self.get(self.tasks.wait.delay(0))
        began = time.monotonic()
        for result in self.tasks.wait.delay_many([(0.5,)] * 200):
            self.get(result)
        self.assertLess(time.monotonic() - began, 4)
        self.assertEqual(worker.stop(), 0)


# == Liveness =================================================================


class Lives(Case):

    def test_a_lock_shows_that_another_process_lives(self):
        path = str(self.folder / "live")
        code = """
            import sys; from pybgworker import LiveFile
            LiveFile.of(sys.argv[1]).hold(7); print("held", flush=True); sys.stdin.read()
        """
        other = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), path], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, env=clean_environment(),
        )
        self.assertEqual(other.stdout.readline(), b"held\n")
        mine = pybgworker.LiveFile.of(path)
        self.assertTrue(mine.is_held(7))
        other.kill()
        other.communicate()

        self.assertIs(mine.is_held(7), False)
        self.assertIs(mine.is_held(8), False)

    def test_a_worker_registers_the_limits_that_it_sets(self):
        self.store
        self.app.override(max_memory=64 << 20, timeout=30.0)
        worker = self.worker_here()
        worker.start()
        self.addCleanup(worker.stop)
        self.assertEqual(self.sql("select max_memory, timeout from bg_worker"),
                         [(64 << 20, 30.0)])

    def test_where_locks_do_not_work_they_say_nothing(self):
        mine = pybgworker.LiveFile.of(str(self.folder / "live"))
        real = pybgworker.fcntl.lockf
        self.addCleanup(setattr, pybgworker.fcntl, "lockf", real)

        def refuse(*_):
            raise OSError(pybgworker.errno.ENOLCK, "no locks here")

        pybgworker.fcntl.lockf = refuse
        mine.hold(7)
        self.assertIsNone(mine.is_held(8))

    def test_our_own_lock_is_alive_and_shared_by_all_users_of_the_file(self):
        path = str(self.folder / "live")
        pybgworker.LiveFile.of(path).hold(1)

        self.assertIs(pybgworker.LiveFile.of(path), pybgworker.LiveFile.of(path))
        (self.folder / "linked").symlink_to(self.folder)
        by_other_name = pybgworker.LiveFile.of(str(self.folder / "linked" / "live"))
        self.assertTrue(by_other_name.is_held(1))
        self.assertTrue(pybgworker.LiveFile.of(path).is_held(1))
        pybgworker.LiveFile.of(path).drop(1)
        self.assertIs(pybgworker.LiveFile.of(path).is_held(1), False)

    def test_a_file_of_locks_that_is_removed_leaves_no_descriptor_open(self):
        path, other = str(self.folder / "live"), str(self.folder / "other")
        pybgworker.LiveFile.of(other).hold(1)           # another queue's worker 1
        count = []
        for _ in range(5):
            locks = pybgworker.LiveFile.of(path)
            locks.hold(1)
            locks.hold_only_here(1)
            pybgworker.LiveFile.of(path, may_create=False)
            count.append(len(os.listdir("/dev/fd")))
            os.unlink(path)
        with self.assertRaises(pybgworker.DatabaseUnavailable):
            pybgworker.LiveFile.of(path, may_create=False)
        self.assertFalse(os.path.exists(path))
        self.assertLessEqual(max(count) - count[0], 1)
        self.assertTrue(pybgworker.LiveFile.of(other)._held)
        pybgworker.LiveFile.of(other).drop(1)

    def test_the_live_file_is_for_those_who_may_write_the_database(self):
        live = f"{self.db}-live"
        self.app.send("t")
        for database, mode in ((0o644, 0o600), (0o640, 0o600), (0o660, 0o660),
                               (0o664, 0o660), (0o666, 0o666), (0o600, 0o600)):
            os.chmod(self.db, database)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(live)
            for _ in range(2):          # made, and found with a mode of before
                with self.subTest(f"{database:o}"):
                    self.forget_live_files()
                    pybgworker.LiveFile.of(live)
                    self.assertEqual(os.stat(live).st_mode & 0o777, mode)
                os.chmod(live, 0o644)

    def forget_live_files(self):
        """As in a new process."""
        pybgworker.LiveFile._open.clear()

    def test_what_others_have_planted_as_the_live_file_is_refused(self):
        live, target = self.folder / "queue.db-live", self.folder / "target"
        self.app.send("t")
        target.write_text("of somebody")
        os.chmod(target, 0o644)
        for plant in (lambda: os.symlink(target, live), lambda: os.link(target, live),
                      lambda: os.symlink("nowhere", live), lambda: os.mkfifo(live),
                      lambda: os.mkdir(live), lambda: shutil.copy(target, live)):
            plant()
            with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "-live: "):
                pybgworker.LiveFile.of(str(live))
            os.rmdir(live) if live.is_dir() else os.unlink(live)
        os.symlink(target, live)
        done = self.cli("run", "--app", "example")
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done)
        self.assertIn("-live: ", done.stderr)
        self.assertEqual(target.read_text(), "of somebody")
        self.assertEqual(target.stat().st_mode & 0o777, 0o644)
        self.assertFalse((self.folder / "nowhere").exists())

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_the_live_file_of_a_stranger_is_refused_and_of_our_group_is_not(self):
        live = self.folder / "queue.db-live"
        self.app.send("t")
        live.touch()
        os.chown(live, 4711, 4711)
        os.chmod(self.db, 0o644)
        with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "somebody else"):
            pybgworker.LiveFile.of(str(live))
        os.chmod(self.db, 0o660)
        pybgworker.LiveFile.of(str(live))

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "needs root")
    def test_what_root_makes_belongs_to_the_owner_of_the_database(self):
        self.app.send("t")
        self.app.store.close()
        os.chown(self.db, 4711, 4712)
        pybgworker.LiveFile.of(f"{self.db}-live")
        found = os.stat(f"{self.db}-live")
        self.assertEqual((found.st_uid, found.st_gid, found.st_mode & 0o777),
                         (4711, 4712, 0o600))

    def liveness(self, timeout=15.0):
        ear = pybgworker.WakeSocket()
        self.addCleanup(ear.close)
        settings = self.app.settings
        settings.worker_timeout = timeout
        found = pybgworker.Liveness(self.store, settings, ear)
        found.register(self.now)
        return found

    def run_of(self, worker, callbacks=0, **options):
        task = pybgworker.Task(self.app, print, "t", options)
        self.app.enqueue(task, [((), {})], {})
        order = pybgworker.ClaimOrder(worker, None, {"t"}, 1, 0, set(), {},
                                      {"t": callbacks})
        turn = pybgworker.Turn(worker, order=order)
        return self.store.turn(turn, pybgworker.now_ms(), 5.0).claimed.runs[0]

    def begin(self, worker, *runs):
        """Mark the cells of runs of a Liveness, as its children do.

        Without cells all had begun, as far as anybody knows.
        """
        if worker.begun.fd < 0:
            return
        marks = pybgworker.Marks(os.dup(worker.begun.fd))
        for run in runs:
            marks.mark(worker.begun.give(run), run.id, run.attempt)
        marks.leave()

    def with_cells(self, count=2):
        """So many workers that have cells."""
        found = [self.liveness() for _ in range(count)]
        if found[0].begun.fd < 0:
            self.skipTest("no cells on this file system")
        return found

    def cells(self):
        """The files of cells that are left."""
        return sorted(path.name for path in self.folder.glob("queue.db-begun-*"))

    def test_a_starting_worker_is_never_reaped(self):
        watching = self.liveness()
        seen = []

        def lock(worker):
            pybgworker.LiveFile.of(self.store.path + "-live").hold(worker)
            other = SqliteStore(str(self.db))
            seen.append([row.id for row in other.workers()])
            other.close()

        row = {"name": "w", "pid": 1, "host": "h", "boot": "b", "port": 0, "token": "",
               "queues": None, "concurrency": 1, "now": self.now,
               "live": pybgworker.LiveFile.of(self.store.path + "-live").number}
        worker = self.store.add_worker(row, lock)
        self.assertEqual(seen, [[watching.id]])
        self.assertEqual(watching.reap_dead(self.now), [])
        self.assertIn(worker, [row.id for row in self.store.workers()])

    def test_a_worker_without_its_lock_is_dead_at_once(self):
        watching, dead = self.liveness(), self.liveness()
        run = self.run_of(dead.id)
        dead.forsake()

        lost, = watching.reap_dead(self.now)
        self.assertEqual((lost.id, lost.state), (run.id, pybgworker.QUEUED))

    def test_a_silent_worker_is_dead_only_after_its_timeout_awake(self):
        silent, watching = self.liveness(), self.liveness(2.0)
        self.run_of(silent.id)
        for _ in range(3):              # a stall of an hour counts as a second
            watching.turn_began -= 3600
            watching.mind_the_time()
            self.assertEqual(watching.reap_dead(self.now + 10**9), [])
        watching.turn_began -= 3600
        watching.mind_the_time()
        self.assertEqual(len(watching.reap_dead(self.now)), 1)

    def test_a_locked_database_makes_nobody_look_dead(self):
        silent, watching = self.liveness(), self.liveness(2.0)
        self.run_of(silent.id)
        for _ in range(8):
            self.assertEqual(watching.reap_dead(self.now), [])
            watching._awake += 1.0
            watching.doubt()

    def test_a_report_beside_a_long_transaction_leaves_the_dead_to_a_worker(self):
        dead = self.liveness()
        self.run_of(dead.id)
        dead.forsake()
        self.app.settings.busy_timeout = 0.05
        store = SqliteStore(str(self.db), busy_timeout=0.05)
        self.addCleanup(store.close)
        blocker = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(blocker.close)
        blocker.execute("begin immediate")
        pybgworker.reap_surely_dead(store, self.now)
        self.assertEqual(self.store.task(1).status, "running")
        blocker.execute("rollback")
        pybgworker.reap_surely_dead(store, self.now)
        self.assertEqual(self.store.task(1).status, "queued")

    def test_another_boot_of_this_machine_is_dead(self):
        watching, old = self.liveness(), self.liveness()
        self.run_of(old.id)
        old.begun.close()
        self.sql("update bg_worker set boot = 'before', live = 0 where id = ?", old.id)
        self.assertEqual(len(watching.reap_dead(self.now)), 1)

    def test_a_boot_that_cannot_be_read_is_no_other_boot(self):
        watching, other = self.liveness(), self.liveness()
        for mine, its in (("a", ""), ("", "a"), ("", "")):
            watching._machine = watching._machine[0], mine
            self.sql("update bg_worker set boot = ?, live = 0 where id = ?", its, other.id)
            self.assertEqual(watching.reap_dead(self.now), [], (mine, its))

    def test_a_held_lock_knows_better_than_the_boot(self):
        watching, other = self.liveness(), self.liveness()
        self.sql("update bg_worker set boot = 'before' where id = ?", other.id)
        self.assertEqual(watching.reap_dead(self.now), [])

    def test_a_removed_lock_file_kills_nobody_and_is_made_again(self):
        """As by a cleaner of /tmp.  Each locks its byte in the new file."""
        old = self.liveness()
        self.run_of(old.id)
        os.remove(f"{self.db}-live")
        young = self.liveness()
        self.assertNotEqual(old._locks.number, young._locks.number)
        self.assertEqual(young.reap_dead(self.now) + old.reap_dead(self.now), [])

        self.assertTrue(old.beat(1, self.now))
        self.assertIs(old._locks, young._locks)
        self.assertEqual(young.reap_dead(self.now), [])
        old.forsake()
        self.assertEqual(len(young.reap_dead(self.now)), 1)

    def test_a_worker_that_was_given_up_locks_its_byte_in_the_new_file(self):
        old = self.liveness()
        os.remove(f"{self.db}-live")
        young = self.liveness()
        self.sql("delete from bg_worker where id = ?", old.id)
        self.assertFalse(old.beat(0, self.now))
        old.register(self.now)
        self.assertEqual(young.reap_dead(self.now), [])

    def test_runs_of_an_unknown_worker_are_found(self):
        watching = self.liveness()
        add_workers(self.store, 4711)
        run = self.run_of(4711)
        self.sql("delete from bg_worker where id = 4711")
        self.assertEqual([lost.id for lost in watching.reap_dead(self.now)], [run.id])

    def test_a_used_up_task_of_a_dead_worker_fails_and_a_cancelled_one_is_cancelled(self):
        watching, dead = self.liveness(), self.liveness()
        last = self.run_of(dead.id, retries=0)
        cancelled = self.run_of(dead.id)
        self.begin(dead, last, cancelled)
        self.store.cancel(cancelled.id, self.now)
        dead.forsake()

        states = {lost.id: lost.state for lost in watching.reap_dead(self.now)}
        self.assertEqual(states, {last.id: pybgworker.FAILED,
                                  cancelled.id: pybgworker.CANCELLED})
        self.assertEqual(self.store.error(last.id)["kind"], "lost")

    def test_who_reaps_a_last_run_enqueues_its_on_failure_and_need_not_know_it(self):
        watching, dead = self.liveness(), self.liveness()
        last = self.run_of(dead.id, callbacks=2, retries=0, queue="q", timeout=7)
        self.begin(
            dead, last, self.run_of(dead.id, callbacks=2),      # it has retries left
            self.run_of(dead.id, callbacks=1, retries=0))
        dead.forsake()

        self.assertEqual(len(watching.reap_dead(self.now)), 3)
        row, = self.store.tasks(name="t:on_failure")
        self.assertEqual((row.status, row.queue, row.timeout), ("queued", "q", 7.0))
        (task_id, error), _ = json.loads(self.store.args(row.id))
        self.assertEqual((task_id, error["kind"]), (last.id, "lost"))

    def test_a_run_of_a_dead_worker_that_had_not_begun_is_as_if_never_claimed(self):
        watching, dead = self.with_cells()
        begun = self.run_of(dead.id, retries=0)
        waiting = self.run_of(dead.id, retries=0, callbacks=2)
        cancelled = self.run_of(dead.id, retries=0)
        self.store.cancel(cancelled.id, self.now)
        self.begin(dead, begun)
        dead.begun.give(waiting)        # sent, and not taken
        dead.forsake()

        lost = {lost.id: (lost.state, lost.begun) for lost in watching.reap_dead(self.now)}
        self.assertEqual(lost, {begun.id: (pybgworker.FAILED, True),
                                waiting.id: (pybgworker.QUEUED, False),
                                cancelled.id: (pybgworker.CANCELLED, False)})
        rows = [self.store.task(run.id) for run in (begun, waiting, cancelled)]
        self.assertEqual([(row.attempt, row.forgiven) for row in rows],
                         [(1, 0), (0, 0), (0, 0)])
        self.assertEqual([self.store.error(run.id) for run in (waiting, cancelled)],
                         [None, None])
        self.assertEqual(self.store.tasks(name="t:on_failure"), [])
        self.assertEqual(self.cells(), [f"queue.db-begun-{watching.id}"])

    def test_what_an_attempt_before_has_left_stays_with_a_run_that_had_not_begun(self):
        watching, dead = self.with_cells()
        first = self.run_of(dead.id)
        error = {"kind": "exception", "message": "as it was"}
        turn = pybgworker.Turn(dead.id, [Outcome(
            first, pybgworker.RETRYING, error=error, run_at=0)], order=pybgworker.ClaimOrder(
                dead.id, None, {"t"}, 1, 0, set(), {}))
        again, = self.store.turn(turn, self.now, 5.0).claimed.runs
        self.begin(dead, first)         # and its cell is not taken back yet
        dead.forsake()
        watching.reap_dead(self.now)
        row = self.store.task(again.id)
        self.assertEqual((again.attempt, row.attempt, row.status), (2, 1, "queued"))
        self.assertEqual(self.store.error(again.id), error)

    def heir(self, worker):
        """A process that has the cells of this worker; it is stopped."""
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"],
                                 pass_fds=[worker.begun.fd])
        self.addCleanup(other.wait)
        self.addCleanup(other.kill)
        other.send_signal(signal.SIGSTOP)
        return other

    def test_while_a_child_of_a_dead_worker_lives_its_cells_are_not_read(self):
        watching, dead = self.with_cells()
        run = self.run_of(dead.id)
        child = self.heir(dead)
        dead.forsake()
        self.assertEqual(watching.reap_dead(self.now), [])
        self.assertTrue(watching.is_behind)     # it is looked again soon
        self.assertEqual(self.store.task(run.id).status, "running")
        child.kill()
        child.wait()
        lost, = watching.reap_dead(self.now)
        self.assertEqual((lost.id, lost.begun, watching.is_behind), (run.id, False, False))

    def test_a_child_that_does_not_die_is_not_waited_for_for_ever(self):
        watching, dead = self.with_cells()
        run = self.run_of(dead.id)
        self.heir(dead)
        dead.forsake()
        self.assertEqual(watching.reap_dead(self.now), [])
        watching._awake += 2.0
        self.assertFalse(watching.is_behind)
        lost, = watching.reap_dead(self.now)
        self.assertEqual((lost.id, lost.begun), (run.id, True))
        self.assertEqual(self.store.task(run.id).attempt, 1)

    def test_a_command_that_reaps_waits_for_the_children_too(self):
        for dies, begun in ((True, 0), (False, 1)):
            dead, = self.with_cells(1)
            run = self.run_of(dead.id)
            child = self.heir(dead)
            dead.forsake()
            with mock.patch.object(pybgworker, "_LAST_GASP", 15 if dies else 0.1), \
                    mock.patch.object(pybgworker, "own_sleep",
                                      lambda _: dies and (child.kill(), child.wait())):
                pybgworker.reap_surely_dead(self.store, self.now)
            row = self.store.task(run.id)
            self.assertEqual((row.status, row.attempt), ("queued", begun))
            self.assertNotIn(f"queue.db-begun-{dead.id}", self.cells())

    def test_cells_go_with_their_worker_and_what_the_dead_have_left_is_swept(self):
        leaving, idle, silent = self.with_cells(3)
        self.run_of(silent.id)
        idle.forsake()
        unknown = self.liveness()
        self.run_of(unknown.id)
        self.sql("delete from bg_worker where id = ?", unknown.id)
        for name in ("queue.db-begun-99", "queue.db-begun-x", "queue.db-begun-9x"):
            (self.folder / name).write_text("")
        leaving.leave()
        young = self.liveness()
        kept = sorted(f"queue.db-begun-{n}" for n in (
            idle.id, silent.id, unknown.id, young.id, "9x", "x"))
        self.assertEqual(self.cells(), kept)
        self.assertEqual(len(young.reap_dead(self.now)), 1)     # of the unknown
        kept.remove(f"queue.db-begun-{idle.id}")
        kept.remove(f"queue.db-begun-{unknown.id}")
        self.assertEqual(self.cells(), kept)

    def test_who_registers_anew_has_new_cells(self):
        worker, = self.with_cells(1)
        run = self.run_of(worker.id)
        self.begin(worker, run)
        before = os.fstat(worker.begun.fd).st_ino
        worker.forsake()
        self.sql("delete from bg_task")
        worker.register(self.now)
        self.assertEqual(self.cells(), [f"queue.db-begun-{n}" for n in (1, 2)])
        self.assertNotEqual(os.fstat(worker.begun.fd).st_ino, before)
        self.assertEqual(worker.begun.give(run), 0)


# == Wishes ===================================================================


class Wishing(QueueCase):

    def setUp(self):
        super().setUp()
        self.pool = mock.Mock()
        self.pool.in_hand.return_value = 5
        self.pool.take_back.side_effect = lambda queues: sorted(queues)
        self.wishes = pybgworker.Wishes(self.store, self.pool)
        self.enqueue(queue="a", count=5)
        self.enqueue(queue="b", count=5)
        self.claim()

    def heed(self):
        """(runs cancelled, queues left) by one look."""
        self.pool.cancel.reset_mock()
        left = self.wishes.heed(1, 0.0)
        return [call.args[0] for call in self.pool.cancel.mock_calls], left

    def other(self, statement):
        other = sqlite3.connect(self.db, isolation_level=None)
        other.execute(statement)
        other.close()

    def test_what_is_wanted_of_runs_in_hand_is_heard(self):
        self.assertEqual(self.heed(), ([], []))
        self.other("insert into bg_queue (name, paused_at) values ('a', 1), ('c', 1)")
        self.assertEqual(self.heed(), ([], ["a"]))
        self.other("update bg_task set cancel_asked = 1 where id in (2, 7)")
        self.assertEqual(self.heed(), ([2, 7], ["a"]))

    def test_a_cancellation_is_asked_for_until_the_run_has_ended(self):
        """The first time, an unread answer may have hidden that it runs."""
        self.other("update bg_task set cancel_asked = 1 where id = 3")
        for _ in range(3):
            self.assertEqual(self.heed()[0], [3])
        self.other("update bg_task set state = 4 where id = 3")
        self.assertEqual(self.heed()[0], [])

    def test_a_look_that_failed_is_made_again(self):
        self.other("insert into bg_queue (name, paused_at) values ('b', 1)")
        error = pybgworker.DatabaseBusy("locked")
        with mock.patch.object(self.store, "pauses_asked", side_effect=error):
            self.assertRaises(pybgworker.DatabaseBusy, self.heed)
        self.assertEqual(self.heed(), ([], ["b"]))

    def test_nobody_is_asked_while_nobody_has_committed(self):
        self.heed()
        asked = self.traced(self.heed)
        self.assertEqual(len(asked), 1, asked)
        self.store.close()                  # a new connection counts from anew
        self.store.data_version()
        self.assertGreater(len(self.traced(self.heed)), 1)

    def test_what_is_paused_elsewhere_costs_nothing(self):
        few = self.steps(self.heed)
        self.other("insert into bg_queue (name, paused_at) values ('elsewhere', 1)")
        some = self.steps(self.heed)
        self.assertLess(few, 150)
        self.sql("""with recursive n (i) as (values (1) union all select i + 1 from n
                    limit 10000) insert into bg_queue (name, paused_at)
                        select 'customer' || i, 1 from n""")
        self.other("update bg_worker set beat_at = beat_at")
        self.assertLess(self.steps(self.heed), some + 100)
        self.other("insert into bg_queue (name, paused_at) values ('b', 1)")
        self.assertEqual(self.heed(), ([], ["b"]))


# == Log ======================================================================


REAL_SOCKET = pybgworker._socket.socket


class Logs(unittest.TestCase):

    def setUp(self):
        self.reader, self.writer = os.pipe()
        self.addCleanup(os.close, self.reader)
        self.addCleanup(lambda: self.writer and os.close(self.writer))

    def log(self, style="json"):
        return Log(self.writer, style, clock=lambda: 1_800_000_000_007)

    def test_a_room_hears_what_is_logged(self):
        out, heard = tempfile.TemporaryFile(), []
        self.addCleanup(out.close)
        journal = pybgworker.Journal(Log(out.fileno()), "w")
        journal.hear(lambda event, fields: heard.append((event, fields)))
        run = Run(1, "t", "q", 0, 0, 0, None, 0, None, "", 5)
        journal.say("heartbeat_error", error="locked")
        journal.run("task_start", run)
        journal.outcome(pybgworker.Outcome(run, 4, duration=0.5))
        journal.run("output", None, text="hi")
        journal.lost(pybgworker.LostRun(2, "u:on_failure", 1, 5, "dead"))
        journal.log.flush(1)
        out.seek(0)
        said = []
        for line in map(json.loads, out.read().decode().splitlines()):
            del line["timestamp"]
            said.append((line.pop("event"), line))
        self.assertEqual(heard, said)
        self.assertEqual([event for event, _ in heard], [
            "heartbeat_error", "task_start", "task_success", "output", "task_lost",
            "task_failure", "callback_error"])

    def test_a_number_is_a_decimal_also_when_it_is_small(self):
        for style, form in ("text", " a={}"), ("json", ',"a":{}'):
            for value, text in ((9.6e-05, "0.000096"), (1e-9, "0.000000001"),
                                (-2.5e-05, "-0.000025"), (0.25, "0.25"), (7, "7")):
                with self.subTest(style, value=value):
                    self.assertEqual(self.log(style).part({"a": value}),
                                     form.format(text))

    def test_a_listener_that_raises_is_said_once_and_hurts_nobody(self):
        journal = pybgworker.Journal(Log(os.open(os.devnull, os.O_WRONLY)), "w")
        heard, calls = [], []

        def broken(event, fields):
            calls.append(event)
            fields.clear()
            raise KeyError("no such counter")

        journal.hear(broken)
        journal.hear(lambda event, fields: heard.append((event, fields.get("error"))))
        for text in ("a", "b"):
            journal.say("heartbeat_error", error=text)
        self.assertEqual(calls, ["heartbeat_error"])
        self.assertEqual(heard, [
            ("listener_dropped", "KeyError('no such counter')"),
            ("heartbeat_error", "a"), ("heartbeat_error", "b")])

    def test_listeners_that_raise_at_the_same_event_hurt_nobody(self):
        class Unprintable(Exception):
            def __repr__(self):
                raise RuntimeError("no words")

        heard, journal = [], pybgworker.Journal(
            Log(os.open(os.devnull, os.O_WRONLY)), "w")

        def one(event, fields):
            raise KeyError(1)

        def other(event, fields):
            raise Unprintable

        def endless(event, fields):
            journal.say("heartbeat_error", error="again")

        for listener in (one, other, one, endless):
            journal.hear(listener)
        journal.hear(lambda event, fields: heard.append((event, fields.get("error"))))
        journal.say("heartbeat_error", error="a")
        self.assertEqual(heard[-1], ("heartbeat_error", "a"))
        errors = [error for event, error in heard if event == "listener_dropped"]
        self.assertEqual(errors.count("KeyError(1)"), 2)
        self.assertEqual(errors.count("<it cannot be printed: RuntimeError>"), 1)
        heard.clear()
        journal.say("heartbeat_error", error="b")
        self.assertEqual(heard, [("heartbeat_error", "b")])

    def test_an_event_is_one_line_of_json(self):
        log = self.log()
        log.event("task_start", task_id=1, name="ä\n\ud800", gone=None, part=0.5, list=[1])
        log.flush()
        line = os.read(self.reader, 1000).decode("ascii")

        self.assertEqual(line.count("\n"), 1)
        self.assertEqual(json.loads(line), {
            "timestamp": "2027-01-15T08:00:00.007Z", "event": "task_start",
            "task_id": 1, "name": "ä\n\ud800", "part": 0.5, "list": [1]})

    def test_text_style_is_the_same_for_eyes(self):
        log = self.log("text")
        log.event("task_start", task_id=1, name="a b")
        log.flush()
        self.assertEqual(os.read(self.reader, 1000),
                         b'2027-01-15T08:00:00.007Z task_start       task_id=1 name="a b"\n')

    def test_a_field_that_cannot_be_written_does_not_raise(self):
        for style in ("json", "text"):
            log = self.log(style)
            log.event("odd", field=object())
            log.flush()
            self.assertIn(b"TypeError", os.read(self.reader, 1000))

    def test_infinite_numbers_stay_json(self):
        log = self.log()
        log.event("odd", field=float("inf"))
        log.flush()
        self.assertIsNone(json.loads(os.read(self.reader, 1000))["field"])

    def test_a_reader_that_sleeps_is_not_waited_for(self):
        log = self.log()
        for _ in range(30_000):
            log.event("output", text="x" * 200)
            if len(log._lines) > 1000:
                log.flush()
        os.set_blocking(self.reader, False)
        found = b""
        for _ in range(3000):
            log.event("more")
            log.flush()
            with contextlib.suppress(BlockingIOError):
                found += os.read(self.reader, 1 << 20)
        dropped = [json.loads(line)["lines"] for line in found.splitlines()[:-1]
                   if b"log_dropped" in line]
        self.assertTrue(dropped and sum(dropped) > 1000)

    def test_two_who_write_to_one_pipe_tear_no_line(self):
        os.set_blocking(self.reader, False)
        logs, found = [self.log(), self.log("json")], b""
        for n in range(600):
            for log in logs:            # they meet a full pipe, in mid-flush
                log.event("output", text="x" * (n * 7 % 900))
                log.flush()
            if n % 50 == 49:
                found += os.read(self.reader, 3000)
        while any(log._unsent for log in logs):
            logs.reverse()
            for log in logs:
                log.flush()
            found += os.read(self.reader, 5000)
        with contextlib.suppress(BlockingIOError):
            while True:
                found += os.read(self.reader, 1 << 20)
        self.assertEqual({len(json.loads(line)["text"]) for line in found.splitlines()},
                         {n * 7 % 900 for n in range(600)})
        self.assertEqual(found.count(b"\n"), 1200)

    def assert_never_waits(self, fd, read):
        """Nobody reads: flush() comes back, and what is written arrives later."""
        log = Log(fd)
        blocking = os.get_blocking(fd)
        for _ in range(3000):
            log.event("output", text="x" * 100)

        def flush():
            log.flush()

        thread = threading.Thread(target=flush, daemon=True)
        thread.start()
        thread.join(5)
        self.assertFalse(thread.is_alive(), "it waits")
        self.assertTrue(log._unsent)
        self.assertEqual(os.get_blocking(fd), blocking)      # others share it
        left = len(log._unsent)
        until(lambda: log.flush() or len(log._unsent) < left or read() and False)

    def test_a_terminal_that_does_not_read_is_not_waited_for(self):
        reader, writer = os.openpty()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        self.assert_never_waits(writer, lambda: os.read(reader, 4000))

    def test_a_pipe_or_a_socket_that_does_not_read_is_not_waited_for(self):
        self.assert_never_waits(self.writer, lambda: os.read(self.reader, 20_000))
        socket = pybgworker.socket
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            mine, theirs = socket.socketpair(socket.AF_UNIX, kind)
            with mine, theirs:
                self.assert_never_waits(mine.fileno(), lambda at=theirs: at.recv(50_000))
                with mock.patch.object(pybgworker._socket, "socket", self.slow_socket):
                    self.assert_never_waits(
                        mine.fileno(), lambda at=theirs: at.recv(50_000))

    def slow_socket(self, **options):
        """What socket.setdefaulttimeout(30) makes of it; not for those of others here."""
        before = pybgworker.socket.getdefaulttimeout()
        pybgworker.socket.setdefaulttimeout(30)
        try:
            return REAL_SOCKET(**options)
        finally:
            pybgworker.socket.setdefaulttimeout(before)

    def test_where_a_pipe_cannot_be_opened_again_poll_says_what_fits(self):
        real = os.open
        self.addCleanup(setattr, os, "open", real)

        def refuse(path, *rest):
            raise OSError(path)

        os.open = refuse
        log = self.log()
        os.open = real
        log.event("said")
        log.flush()
        self.assertIn(b"said", os.read(self.reader, 1000))
        os.open = refuse
        self.assert_never_waits(self.writer, lambda: os.read(self.reader, 20_000))

    def test_a_log_that_is_gone_leaves_no_descriptor(self):
        before = os.dup(self.reader)
        os.close(before)
        for _ in range(10):
            self.log()
        after = os.dup(self.reader)
        os.close(after)
        self.assertEqual(after, before)

    def test_a_closed_or_full_output_is_survived(self):
        os.close(self.writer)
        log = Log(self.writer)
        self.writer = None
        log.event("lost")
        log.flush()
        if os.path.exists("/dev/full"):
            full = os.open("/dev/full", os.O_WRONLY)
            log = Log(full)
            log.event("lost")
            log.flush()
            os.close(full)


# == Upkeep ===================================================================


HOUR, DAY, YEAR = 3_600_000, 86_400_000, 366 * 86_400_000      # ms


class Upkeeps(QueueCase):

    def upkeep(self):
        """That of a worker that starts."""
        self.events = getattr(self, "events", [])
        self.app.override(retention="7d", retention_failed="30d")
        return pybgworker.Upkeep(
            self.store, self.app.settings,
            lambda event, **fields: self.events.append((event, fields)))

    def look(self, upkeep, now, awake=0.0):
        """A look and a pruning; the monotonic clock goes on by `awake` seconds."""
        self.at = getattr(self, "at", 100.0) + awake
        upkeep.mind_clock(now, self.at)
        upkeep.prune(now)
        return len(self.sql("select 1 from bg_task where state > 3"))

    def finished(self, age, count=3):
        self.enqueue(count=count)
        for run in self.claim():
            self.finish(run)
        self.sql("update bg_task set finished_at = ?", self.now - age)

    LOOKS = """
        hours of the looks          believed
        0 1 2                       yes yes yes
        0 9000 9000.02 1            yes no no yes
        0 9000 9000.02 9024         yes no no yes
        0 9000 9023                 yes no no
        0 48 49 50.1                yes no no yes
        0 24 48 72                  yes no yes no
        0 24 9000 48                yes no no no
        0 -9000 0 1.1 24            yes yes no no yes
    """

    def test_when_a_leap_of_the_clock_is_believed(self):
        for line in self.LOOKS.strip().splitlines()[1:]:
            hours, wanted = re.split(r"\s{4,}", line.strip())
            view, believed = None, []
            for hour in hours.split():
                now = self.now + int(float(hour) * HOUR)
                view = pybgworker.look_at_clock(view, now)
                believed.append("yes" if view.doubted is None else "no")
            with self.subTest(hours):
                self.assertEqual(" ".join(believed), wanted)

    def test_a_clock_a_year_ahead_while_a_worker_starts_prunes_nothing(self):
        self.finished(HOUR)
        self.look(self.upkeep(), self.now)
        wrong = self.upkeep()
        self.assertEqual(self.look(wrong, self.now + YEAR), 3)
        self.assertEqual(self.look(wrong, self.now + YEAR + HOUR, awake=3600), 3)
        self.assertEqual(self.look(self.upkeep(), self.now + YEAR + 2 * HOUR), 3)
        self.assertEqual(self.look(self.upkeep(), self.now + HOUR // 2), 3)
        self.sql("update bg_task set finished_at = finished_at - ?", 8 * DAY)
        self.assertEqual(self.look(self.upkeep(), self.now + HOUR // 2 + 1), 0)

    def test_a_clock_that_leaps_under_a_running_worker_prunes_nothing(self):
        self.finished(HOUR)
        upkeep = self.upkeep()
        for turn in range(10):
            self.look(upkeep, self.now + turn, awake=0.001)
        self.assertEqual(self.look(upkeep, self.now + 40 * DAY, awake=0.001), 3)
        self.assertEqual([(e, f["seconds"]) for e, f in self.events],
                         [("clock_leap", 40 * 86400)])
        self.assertEqual(self.look(upkeep, self.now + 60, awake=0.06), 3)
        self.assertEqual(self.events[-1][1]["in_doubt"], False)

    def test_a_leap_that_meets_a_lock_is_doubted_and_said_once(self):
        self.finished(HOUR)
        self.look(self.upkeep(), self.now)
        upkeep, other = self.upkeep(), sqlite3.connect(self.db, isolation_level=None)
        other.execute("begin immediate")
        self.assertRaises(pybgworker.DatabaseBusy, self.look, upkeep, self.now + YEAR)
        self.assertTrue(upkeep.is_in_doubt)
        other.close()
        for turn in range(3):
            self.assertEqual(self.look(upkeep, self.now + YEAR + turn), 3)
        self.assertEqual([event for event, _ in self.events], ["clock_leap"])

    def test_after_a_long_pause_old_tasks_go_within_a_day(self):
        self.finished(HOUR)
        upkeep = self.upkeep()
        self.look(upkeep, self.now)
        kept = [self.look(upkeep, self.now + 40 * DAY + n * HOUR, awake=3600.0)
                for n in range(26)]
        self.assertEqual((kept[22], kept[-1]), (3, 0))

    def test_an_hour_of_the_same_clock_costs_few_writes(self):
        upkeep = self.upkeep()
        self.look(upkeep, self.now)
        writes, connection = [], self.store.db.link().connection
        connection.set_trace_callback(
            lambda text: writes.append(text) if "begin" in text.lower() else None)
        for second in range(3600):
            upkeep.mind_clock(self.now + second * 1000, self.at + second)
        connection.set_trace_callback(None)
        self.assertLessEqual(len(writes), 61)

    def test_waits_from_a_time_that_has_not_come_begin_now(self):
        ahead = self.now + YEAR
        self.look(self.upkeep(), ahead)
        self.enqueue(count=600)
        for run in self.claim(free=600):
            self.finish(run, pybgworker.RETRYING, run_at=ahead + 5000,
                        error={"kind": "x"}, started_at=ahead - 2000, duration=2.0)
        for name, created, run_at, counted in (
            ("countdown", ahead, ahead + 50_000, True),         # or the jitter of cron
            ("eta", ahead, ahead + 50_000, False),              # a time, not a span
            ("patient", self.now - 9, self.now + 9 * HOUR, True),
        ):
            task = pybgworker.NewTask(
                name, "q", 5, None, 0, None, pybgworker.SCHEDULED, run_at, created,
                counted=counted)
            self.store.enqueue(task, ["[[],{}]"])
        upkeep = self.upkeep()
        self.at += 1
        self.assertTrue(upkeep.mind_clock(self.now, self.at))
        self.assertTrue(upkeep.mind_clock(self.now, self.at))
        self.assertFalse(upkeep.mind_clock(self.now, self.at))
        self.assertEqual(
            self.sql("select name, run_at - ?, count(*) from bg_task group by 1, 2 "
                     "order by 1", self.now),
            [("countdown", 50_000, 1), ("eta", YEAR + 50_000, 1),
             ("patient", 9 * HOUR, 1), ("t", 5000, 600)])

    def test_a_clock_set_back_by_minutes_delays_no_wait_either(self):
        """Under the worker, or before it starts; seconds are not worth it."""
        calls = {"countdown": 50, "eta": pybgworker.datetime.fromtimestamp(
            self.now / 1000 + 50)}
        for minutes, is_running in ((5, True), (5, False), (0.1, True)):
            self.sql("delete from bg_task")
            upkeep = self.upkeep()
            self.look(upkeep, self.now)
            with mock.patch.object(pybgworker, "now_ms", return_value=self.now):
                for option, value in calls.items():
                    self.app.send(option, **{option: value})
            upkeep = upkeep if is_running else self.upkeep()
            after = self.now - int(minutes * 60_000)
            with self.subTest(minutes=minutes, is_running=is_running):
                is_told = upkeep.mind_clock(after, self.at + 0.1)
                waits = dict(self.sql("select name, run_at - ? from bg_task", after))
                shift = self.now - after
                self.assertEqual(is_told, minutes == 5)
                self.assertEqual(waits, {"countdown": 50_000 + shift * (minutes < 1),
                                         "eta": 50_000 + shift})
            self.sql("delete from bg_meta where name = 'clock'")


# == Tally ====================================================================


class Tallies(QueueCase):

    def setUp(self):
        super().setUp()
        journal = pybgworker.Journal(Log(os.open(os.devnull, os.O_WRONLY)), "w")
        self.outbox = pybgworker.Outbox(self.store, journal, {})
        self.tally = self.outbox.tally

    def end(self, count=1, name="t", at=math.inf, **values):
        """Let runs end and write that; `at` is monotonic."""
        self.enqueue(name, count=count)
        values = {"state": pybgworker.SUCCESS, "result": "1", "duration": 0.1, **values}
        self.outbox.outcomes = [
            Outcome(run, **values) for run in self.claim(names={name}, free=count)]
        return self.turn_box(at)

    def turn_box(self, at=math.inf):
        return self.outbox.turn(1, self.now, 5.0, at=at)

    def counted(self):
        """(runs in history, tasks finished), as another connection sees them."""
        return self.sql("""select (select ifnull(sum(runs), 0) from bg_history),
                                  (select count(*) from bg_task where state > 3)""")[0]

    def test_below_ten_turns_a_second_an_end_and_its_count_are_one_commit(self):
        for n in range(1, 6):
            self.end(at=100 + n * 0.1)
            self.assertEqual(self.counted(), (n, n))
            self.assertEqual(self.tally.next_due, math.inf)

    def test_what_ends_sooner_waits_for_a_tenth_of_a_second_to_pass(self):
        self.end(at=100.0)
        self.end(2, at=100.05)
        self.assertEqual(self.counted(), (1, 3))
        self.assertEqual(self.tally.next_due, 100.1)
        self.end(3, at=100.09)
        self.assertEqual(self.counted(), (1, 6))
        self.end(4, at=100.11)
        self.assertEqual(self.counted(), (10, 10))
        self.end(5, at=100.15)
        self.turn_box(at=100.20)
        self.assertEqual(self.counted(), (10, 15))
        self.turn_box(at=100.22)
        self.assertEqual(self.counted(), (15, 15))

    def test_a_turn_of_its_own_does_not_wait_for_the_disk(self):
        self.end(at=100.0)
        self.end(at=100.01)
        found = self.traced(lambda: self.turn_box(at=100.2))
        self.assertIn("pragma synchronous = normal", found)
        self.assertFalse([text for text in found if "bg_task" in text])

    def test_the_last_turn_writes_what_is_kept(self):
        self.end(at=100.0)
        self.end(at=100.01)
        self.outbox.turn(1, self.now, 5.0, stopped=[])      # as stop() does
        self.assertEqual(self.counted(), (2, 2))

    def test_turns_that_end_nothing_write_nothing(self):
        for at in (100.0, 100.5):
            self.enqueue()
            self.outbox.turn(1, self.now, 5.0, self.order(), at=at)
        self.assertEqual(self.counted(), (0, 0))

    def test_a_turn_that_is_undone_counts_nothing_and_later_once(self):
        """Whatever statement fails; and whether runs were kept before or not."""
        for kept in (0, 2):
            for n in range(1, 40):
                self.setUp()
                self.end(at=100.0)
                if kept:
                    self.end(kept, at=100.01)
                self.enqueue(count=3)
                self.outbox.outcomes = [
                    Outcome(run, 4, "1", duration=0.1) for run in self.claim()]
                link, before = self.store.db.link(), self.counted()
                link.connection = failing = Faults.Failing(link.connection, n)
                try:
                    self.turn_box(at=101.0)
                    is_over = True
                except pybgworker.DatabaseUnavailable:
                    is_over = False
                    self.assertEqual(self.counted(), before)
                link.connection = failing.real
                if not is_over:
                    self.turn_box(at=101.1)
                with self.subTest(kept=kept, n=n):
                    self.assertEqual(self.counted(), (kept + 4, kept + 4))
                if is_over:
                    self.assertGreater(n, 5)
                    break

    def test_a_locked_database_loses_nothing(self):
        self.end(at=100.0)
        self.end(2, at=100.01)
        self.enqueue()
        self.outbox.outcomes = [Outcome(run, 4, "1") for run in self.claim()]
        other = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("begin immediate")
        for at in (101.0, 102.0):
            with self.assertRaises(pybgworker.DatabaseBusy):
                self.outbox.turn(1, self.now, 0.01, at=at)
        other.execute("rollback")
        self.assertEqual(self.counted(), (1, 3))
        self.turn_box(at=103.0)
        self.assertEqual(self.counted(), (4, 4))

    def test_a_full_disk_loses_nothing(self):
        self.end(at=100.0)
        for n in range(200):
            self.end(name=f"n{n}", at=100.01)
        connection = self.store.db.link().connection
        pages, = connection.execute("pragma page_count").fetchone()
        connection.execute(f"pragma max_page_count = {pages}").fetchall()
        with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "full"):
            self.turn_box(at=101.0)
        self.assertEqual(self.counted(), (1, 201))
        connection.execute("pragma max_page_count = 1000000").fetchall()
        self.turn_box(at=102.0)
        self.assertEqual(self.counted(), (201, 201))

    def test_what_cannot_be_stored_is_counted_once_and_as_failed(self):
        turned = self.end(3, at=100.0, started_at=10**17)
        self.assertEqual([o.state for o in turned.written], [pybgworker.FAILED] * 3)
        row, = self.store.totals()
        self.assertEqual((row.runs, row.failed, row.exceptions), (3, 3, 3))

    def test_a_thousand_and_one_names_are_told_apart_until_the_next_quarter(self):
        names = [f"n{n}" for n in range(1001)]
        for name in names:
            self.enqueue(name)
        self.outbox.outcomes = [Outcome(run, 4, "1") for run in self.claim(
            names=set(names), free=2000)]
        self.turn_box()
        self.end(name="late")
        rows = {row.name: row.runs for row in self.store.totals()}
        self.assertEqual((len(rows), rows["(other)"]), (1001, 2))
        self.now += 900_000
        self.end(name="late")           # from the first addition on
        self.end(name="late")
        rows = {row.name: row.runs for row in self.store.totals()}
        self.assertEqual((rows["late"], rows["(other)"]), (1, 3))


# == Settling =================================================================


class Settling(unittest.TestCase):

    TABLE = """
        kind       retryable  last | becomes   final
        success    -          no   | success   -
        success    -          yes  | success   -
        exception  yes        no   | retrying  -
        exception  yes        yes  | failed    used_up
        exception  no         no   | failed    retry_for
        exception  no         yes  | failed    retry_for
        exception  never      no   | failed    refused
        crash      yes        no   | retrying  -
        crash      yes        yes  | failed    used_up
        timeout    yes        no   | retrying  -
        timeout    yes        yes  | failed    used_up
        abort      no         no   | failed    abort
        cancelled  no         no   | cancelled -
    """

    def test_what_follows_a_run(self):
        for line in self.TABLE.strip().splitlines()[1:]:
            kind, retryable, last, _, becomes, final = line.split()
            run = Run(1, "t", "q", 0, 0 if last == "yes" else 3, 0, None, 0, None, "", 5)
            error = None if kind == "success" else {
                "kind": kind, "retryable": retryable == "yes"}
            if (kind, retryable) == ("exception", "no"):
                error["retry_for"] = ["OSError"]
            end = pybgworker.Ended(run, kind, "1", error)
            found = pybgworker.settle(end, RetryPolicy(jitter=0), 1000, 0.5)
            with self.subTest(line):
                self.assertEqual(pybgworker.STATE_NAMES[found.state], becomes)
                self.assertEqual((found.error or {}).get("final", "-"), final)

    def test_what_no_retry_is_for_says_which_errors_one_is_for(self):
        """An Abort and a result that cannot be stored do not: no class would do."""
        def failed(exc, **options):
            made = App(db="x.db").task(name="t", **options)(print)
            run = types.SimpleNamespace(raised=None, task=made)
            return pybgworker._error_of(exc, run)

        refused = pybgworker._ResultRefused("x")
        refused.__cause__ = TypeError("x")
        for exc, options, classes in (
            (KeyError("x"), {"retry_for": (OSError, ValueError)}, ["OSError", "ValueError"]),
            (KeyError("x"), {"retry_for": ()}, []), (SystemExit(3), {}, ["Exception"]),
            (KeyError("x"), {}, None), (pybgworker.Abort("x"), {}, None),
            (refused, {}, None), (pybgworker.Retry(), {"retry_for": ()}, None),
        ):
            error = failed(exc, **options)
            with self.subTest(exc):
                self.assertEqual(error.get("retry_for"), classes)
                kept = pybgworker._kept_error({**error, "peak": 7, "cpu": 0.5})
                self.assertEqual(kept.get("retry_for"), classes)
                self.assertEqual((kept["peak"], kept["cpu"]), (7, 0.5))

    def test_a_retry_waits_for_its_delay_or_for_what_it_asked(self):
        run = Run(1, "t", "q", 1, 5, 0, None, 0, None, "", 5)       # its second
        for countdown, wait in ((None, 2000), (30, 30_000), (-5, 0)):
            error = {"kind": "exception", "retryable": True, "countdown": countdown}
            end = pybgworker.Ended(run, "exception", None, error)
            found = pybgworker.settle(end, RetryPolicy(jitter=0), 1000, 0.5)
            self.assertEqual(found.run_at, 1000 + wait)

    def test_no_delay_is_too_long_for_its_column(self):
        run = Run(1, "t", "q", 9, 99, 0, None, 0, None, "", 5)
        end = pybgworker.Ended(run, "crash", None, {"kind": "crash", "retryable": True})
        policy = RetryPolicy(delay=10**11, max_delay=10**11, jitter=1000)
        self.assertLess(pybgworker.settle(end, policy, 10**15, 0.99).run_at, 10**16)


class Outboxes(QueueCase):

    def setUp(self):
        super().setUp()
        self.log = self.folder / "log"
        journal = pybgworker.Journal(Log(os.open(self.log, os.O_CREAT | os.O_WRONLY)), "w")
        self.outbox = pybgworker.Outbox(self.store, journal, {})

    def commit(self):
        return self.outbox.turn(1, self.now, 5.0, self.order())

    def test_a_cell_is_free_when_what_became_of_its_run_is_committed(self):
        self.enqueue(count=6)
        runs, cells = self.claim(), self.outbox._begun
        cells.open(self.store.path, 1, 6)
        self.addCleanup(cells.remove)
        if cells.fd < 0:
            self.skipTest("no cells on this file system")
        for run in runs:
            cells.give(run)
        poison = Outcome(runs[3], **self.POISON[3], error={"type": "OutcomeRefused"})
        self.outbox.outcomes = [Outcome(runs[0], 4, "1"), poison]
        self.outbox.returned = [runs[1]]
        other = sqlite3.connect(self.db, isolation_level=None)
        other.execute("begin immediate")
        with self.assertRaises(pybgworker.DatabaseBusy):
            self.outbox.turn(1, self.now, 0.01)
        self.assertEqual(len(cells._cells), 6)
        other.close()
        self.outbox.turn(1, self.now, 5.0, stopped=[runs[2]])
        # What could not be written is left to be reaped: as begun.
        self.assertEqual(list(cells._cells), runs[3:])

    def test_what_makes_work_is_looked_for_in_the_turn_that_writes_it(self):
        self.enqueue(count=4)
        plain, then, back, counted = self.claim(free=3) + self.claim(most={"t": 9})
        row = NewTask("t", "q", 5, None, 0, None, pybgworker.QUEUED, self.now, self.now)
        for part, makes_work in (
            ({"outcomes": [Outcome(plain, 4)]}, False), ({"returned": [back]}, True),
            ({"outcomes": [Outcome(then, 4, then=((row, "[[],{}]"),))]}, True),
            ({"outcomes": [Outcome(plain, 4), Outcome(counted, 4)]}, True),
        ):
            self.outbox.clear()
            vars(self.outbox).update(part)
            self.assertEqual(self.outbox.makes_work, makes_work)

    # What SQLite does not take, by a constraint, by its size, by its characters.
    POISON = (
        dict(state=pybgworker.RETRYING, run_at=10**18, error={"kind": "crash"}),
        dict(state=pybgworker.SUCCESS, result="1", started_at=10**17),
        dict(state=pybgworker.SUCCESS, result="1", started_at=10**30),
        dict(state=pybgworker.SUCCESS, result="1", output="\udc80"),
    )

    def test_what_cannot_be_stored_fails_and_holds_up_nothing_else(self):
        self.enqueue(count=len(self.POISON) * 2 + 1)
        runs = self.claim(callbacks={"t": 2})
        self.outbox.outcomes = [
            Outcome(run, **(self.POISON[n // 2] if n % 2 else dict(state=4, result="1")))
            for n, run in enumerate(runs)]

        self.enqueue("u")

        turned = self.commit()

        self.assertEqual([run.name for run in turned.claimed.runs], ["u"])
        self.assertEqual(len(turned.written), len(runs))
        for n, run in enumerate(runs):
            with self.subTest(n):
                wanted = "failed" if n % 2 else "success"
                self.assertEqual(self.status(run.id), wanted)
                if n % 2:
                    error = self.store.error(run.id)
                    self.assertEqual(error["type"], "OutcomeRefused")
                    self.assertIn("cannot be stored", error["message"])
        called = self.store.tasks(name="t:on_failure")
        self.assertEqual(len(called), len(self.POISON))
        self.assertFalse(self.outbox.is_full)

    @unittest.skipUnless(hasattr(sqlite3.Connection, "setlimit"), "needs Python 3.11")
    def test_a_result_above_the_limit_of_this_sqlite_fails_its_task(self):
        self.enqueue(count=2)
        big, small = self.claim()
        self.store.db.link().connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 20_000)
        self.outbox.outcomes = [Outcome(big, 4, "1" * 30_000), Outcome(small, 4, "1")]
        self.commit()
        self.assertEqual(self.status(small.id), "success")
        self.assertIn("too big", self.store.error(big.id)["message"])

    def test_a_run_that_cannot_even_fail_is_left_to_be_reaped(self):
        self.enqueue(count=2)
        first, second = self.claim()
        self.sql("""create trigger mine before update on bg_task
            when new.id = 1 and new.state > 3 begin select raise(abort, 'no'); end""")
        self.outbox.outcomes = [Outcome(first, 4, "1"), Outcome(second, 4, "1")]
        self.commit()
        self.assertEqual(self.status(first.id), "running")
        self.assertEqual(self.status(second.id), "success")
        self.sql("drop trigger mine")
        self.assertEqual(self.store.reap(1, "w", self.now)[0].id, first.id)

    def test_a_retry_that_somebody_has_cancelled_is_said_to_be_cancelled(self):
        self.enqueue(count=2)
        first, second = self.claim()
        self.store.cancel(first.id, self.now)
        error = {"kind": "exception", "type": "E", "message": "m"}
        self.outbox.outcomes = [
            Outcome(run, pybgworker.RETRYING, error=error, run_at=self.now + 9000)
            for run in (first, second)]
        self.assertEqual([outcome.state for outcome in self.commit().written],
                         [pybgworker.CANCELLED, pybgworker.RETRYING])
        self.assertEqual(self.status(first.id), "cancelled")
        self.assertEqual(self.status(second.id), "retrying")

    def test_what_is_lost_for_good_is_said_like_what_failed(self):
        said = []
        self.outbox._journal.hear(lambda event, fields: said.append((event, fields)))
        for state in (pybgworker.QUEUED, pybgworker.FAILED):
            lost = pybgworker.LostRun(1, "t:on_failure", 4, state, "w")
            self.outbox._journal.lost(lost)
        self.assertEqual([event for event, _ in said],
                         ["task_lost", "task_lost", "task_failure", "callback_error"])
        self.assertEqual((said[2][1]["kind"], said[2][1]["attempt"]), ("lost", 4))


# == Lookout ==================================================================


class Lookouts(unittest.TestCase):

    class Data:
        """A store of which only the version matters, and what a look would see."""

        def __init__(self):
            self.version, self.looks, self.seen = 1, 0, (False, None)

        def data_version(self):
            return self.version

        def peek(self, order, now):
            self.looks += 1
            return self.seen

    def setUp(self):
        self.data = self.Data()
        settings = App(rate_limit="5/s").settings
        self.tasks = {"t": mock.Mock(rate_limit=None, callbacks=0, max_running=0,
                                     is_async=False),
                      "u": mock.Mock(rate_limit=2.0, callbacks=3, max_running=7,
                                     is_async=True)}
        self.lookout = pybgworker.Lookout(self.data, settings, self.tasks)
        self.see()

    def see(self, found=False, next_at=None, after=None, **limited):
        round_ = pybgworker.Round(after, limited)
        self.data.seen = found, pybgworker.Claimed([], next_at, round_)

    def look(self, now=1000, room=(1, 0), unknown=()):
        """True when it has looked."""
        before = self.data.looks
        order = self.lookout.order(1, pybgworker.Room(*room), set(unknown), set())
        if order:
            found, seen = self.lookout.look(order, now)
            if seen:
                self.lookout.learn(seen)
        return self.data.looks > before

    def test_it_looks_once_and_then_only_for_a_reason(self):
        def nothing():
            pass

        for reason, happens, then in (
            ("somebody committed", lambda: setattr(self.data, "version", 2), {}),
            ("a datagram", lambda: setattr(self.lookout, "news", True), {}),
            ("a task is due", lambda: setattr(self.lookout, "next_at", 1000), {}),
            ("more free children", nothing, {"room": (2, 0)}),
            ("more places in pipes", nothing, {"room": (1, 1)}),
            ("more places on event loops", nothing, {"room": (1, 0, 1)}),
            ("an empty child", nothing, {"room": (1, 0, 0, 1)}),
            ("other names", nothing, {"unknown": {"t"}}),
        ):
            with self.subTest(reason):
                self.setUp()
                self.assertEqual([self.look(), self.look()], [True, False])
                happens()
                self.assertTrue(self.look(**then))
        self.setUp()
        self.assertFalse(self.look(room=(0, 0)))
        self.assertFalse(self.look(room=(0, 0, 0, 1)), "a spare child is no place")
        self.assertTrue(self.look(room=(1, 0)), "it was never looked for")

    def test_what_a_round_has_not_reached_is_looked_for_at_once(self):
        self.see(after=("q", "n"))
        self.assertEqual([self.look(), self.lookout.seconds(1000), self.look()],
                         [True, 0.0, True])
        self.see()
        self.assertTrue(self.look())
        self.assertFalse(self.look())
        self.assertEqual(self.lookout.seconds(1000), float("inf"))

    def test_it_is_done_when_nothing_is_due_and_nothing_waits_for_a_rate(self):
        self.assertFalse(self.lookout.is_done(1000))
        self.look()
        self.assertTrue(self.lookout.is_done(1000))
        self.see(next_at=2500)
        self.lookout.news = True
        self.look()
        self.assertEqual((self.lookout.is_done(1000), self.lookout.seconds(1000)),
                         (True, 1.5))
        self.assertFalse(self.lookout.is_done(2500))
        for until, seconds in ((9000, 8), (math.inf, math.inf)):    # a rate, a run
            self.see(next_at=None if until == math.inf else until, u=until)
            self.lookout.news = True
            self.look()
            self.assertEqual((self.lookout.is_done(1000), self.lookout.seconds(1000)),
                             (False, seconds))

    def test_an_order_says_what_is_known_and_which_limits_there_are(self):
        order = self.lookout.order(7, pybgworker.Room(2, 3), {"t"}, {"u"})
        self.assertEqual((order.worker, order.free, order.ahead, set(order.names)),
                         (7, 2, 3, {"u"}))
        self.assertEqual((order.rates, order.callbacks), ({"u": 2.0, "": 5.0}, {"u": 3}))


# == Senses ===================================================================

class Sensing(unittest.TestCase):
    def setUp(self):
        self.senses = pybgworker.Senses()
        self.addCleanup(self.senses.close)

    def send(self, token):
        pybgworker.send_wake_ups([(self.senses.ear.port, token)])

    def test_what_ended_a_sleep_is_said(self):
        self.assertEqual(self.senses.hear(0), pybgworker.Heard([], False, False))
        self.send(self.senses.ear.token)
        self.assertEqual(self.senses.hear(5), pybgworker.Heard([], True, False))
        self.send("forged")
        self.assertEqual(self.senses.hear(5), pybgworker.Heard([], False, False))
        ours, theirs = pybgworker.socket_pair()
        for end in (ours, theirs):
            self.addCleanup(end.close)
        self.senses.selector.register(ours, 1, "child")
        theirs.send(b"x")
        self.assertEqual(self.senses.hear(5).children, [("child", ours.fileno())])

    def test_a_signal_is_heard_and_counted(self):
        with self.senses.stops.caught():
            self.senses.begin()
            os.kill(os.getpid(), signal.SIGCHLD)
            self.assertTrue(self.senses.hear(5).signal)
            self.assertEqual(self.senses.stops.count, 0)
            os.kill(os.getpid(), signal.SIGTERM)
            self.assertTrue(self.senses.hear(5).signal)
            self.assertEqual(self.senses.stops.count, 1)
            self.senses.selector.unregister(self.senses.stops.receiver)


# == Signs ====================================================================

TELLING = """
    import asyncio, os, time

    def told():
        with open("told", "a") as f:
            f.write("x\\n")

    @task
    def tell(name, *until):
        print(name, "begins")
        told()
        for n, path in enumerate(until):
            while not os.path.exists(path):
                time.sleep(0.005)
            if not n:
                print(name, "ends")
                told()

    @task
    async def atell(name, until):
        print(name, "begins")
        while not os.path.exists(until):
            await asyncio.sleep(0.05)
        print(name, "ends")

    @task
    def storm():
        for n in range(20_000):
            print(n)
        print("last line")
        while not os.path.exists("go"):
            time.sleep(0.005)
        print("y" * 1_000_000)
"""


# What happens within a second or two, on a machine that has time for us.
seen = functools.partial(until, timeout=60)


class Telling(PoolCase):
    """Which runs of a pool are told of, and when."""

    def setUp(self):
        super().setUp()
        self.stored = mock.Mock()
        self.runs = [self.run_of(n) for n in range(1, 5)]
        self.pool, self.member = self.pool_of(*self.runs)
        self.member.process.exit = None
        self.signs = pybgworker.Signs(self.stored, self.pool)

    def told(self, at=0.0):
        """(rows, gone, printed) that are written then; None: nothing is."""
        self.stored.reset_mock()
        self.signs.note_runs(1, self.now, self.member.slot.began + at)
        calls = self.stored.note_runs.mock_calls
        if not calls:
            return None
        worker, rows, gone, printed, now = calls[0].args
        self.assertEqual((worker, now), (1, self.now))
        return [(row.task, row.began_at, row.behind) for row in rows], gone, printed

    def test_only_what_has_run_for_a_second_is_told_of_and_what_waits_behind_it(self):
        self.assertIsNone(self.told(0.9))
        self.assertFalse(self.runs[0].is_noted)
        rows = [(1, self.now - 1000, None), *[(n, None, 1) for n in (2, 3, 4)]]
        self.assertEqual(self.told(1.0), (rows, [], []))
        self.assertTrue(all(run.is_noted for run in self.runs))
        self.now += 1003                            # the clock was set meanwhile
        self.assertIsNone(self.told(2.0))           # nothing is new

    def test_what_has_begun_since_or_was_taken_back_is_told(self):
        self.told(1.0)
        self.pool.hand.put_in_front([self.member.waiting.pop()])
        self.assertEqual(self.told(1.5), ([], [(4, 1)], []))
        began = self.member.slot.began
        self.member.begin_next(began)               # 1 has ended: its rows went with it
        self.member.slot.began = began
        rows = [(2, self.now - 1000, None), (3, None, 2)]
        self.assertEqual(self.told(1.0), (rows, [], []))
        self.member.begin_next(self.member.slot.began + 1.0)    # the next is young
        self.assertEqual(self.told(0.1), ([], [(3, 1)], []))

    def test_what_was_not_written_is_told_again(self):
        self.stored.note_runs.side_effect = pybgworker.DatabaseBusy("locked")
        kept = self.member.slot.printed("x") or self.member.slot.kept
        for _ in range(2):
            self.assertRaises(pybgworker.DatabaseBusy, self.told, 1.0)
            self.assertEqual((kept.told, self.runs[0].is_noted), (0, True))
        self.stored.note_runs.side_effect = None
        rows, _, printed = self.told(1.0)
        self.assertEqual((len(rows), printed), (4, [(self.runs[0], [(0, "x")], 1)]))
        self.assertEqual(kept.told, 1)
        self.assertIsNone(self.told(1.0))

    def test_of_more_than_a_thousand_nothing_is_told(self):
        member = self.add_member(self.pool)
        self.begin_beside(member, *[self.run_of(n) for n in range(100, 2000)],
                          at=self.member.slot.began)
        rows, *_ = self.told(5.0)
        self.assertEqual(len(rows), 1000)

    def test_of_coroutines_those_that_have_run_for_a_second_are_told(self):
        member, began = self.add_member(self.pool), self.member.slot.began
        for n in range(3):
            self.begin_beside(member, self.run_of(10 + n), at=began + n)
        rows, *_ = self.told(2.5)
        self.assertEqual([row for row in rows if row[0] > 4],
                         [(10, self.now - 2500, None), (11, self.now - 1500, None)])


class Signs(Served):

    def row(self):
        return next(iter(self.store.workers()), None)

    def wait_row(self, **fields):
        """Wait until the worker's row has these; return it."""
        return seen(lambda: next((
            row for row in self.store.workers()
            if all(getattr(row, k) == v for k, v in fields.items())), None), what=fields)

    def test_a_worker_says_at_once_how_far_it_is(self):
        """With a heartbeat every ten minutes."""
        worker = self.worker("--heartbeat-interval", 600, "--worker-timeout", 1200,
                             "--rate-limit", "100/s")
        row = self.wait_row(state="ready")
        self.assertEqual((row.rate, row.version, row.note),
                         (100, pybgworker.__version__, None))
        self.tasks.hold.delay()
        self.wait_lines("held")
        worker.signal(signal.SIGTERM)
        self.wait_row(state="stopping")
        (self.folder / "go").touch()
        self.assertEqual(worker.wait(), 0)
        self.assertIsNone(self.row())

    def test_others_can_see_whether_the_loop_turns_and_is_ready(self):
        self.app.task(lambda: 1, name="one")
        worker = self.worker_here()
        self.assertEqual(pybgworker.health_of(worker).trouble, "no child is ready")
        before = pybgworker.health_of(worker).turned_at
        with mock.patch.object(worker.pool.crew, "is_ready", return_value=True):
            worker.liveness.mind_the_time()
            health = pybgworker.health_of(worker)
            self.assertEqual(health.trouble, "")
            self.assertGreater(health.turned_at, before)
            trouble = worker.house.trouble
            busy = mock.Mock(side_effect=pybgworker.DatabaseBusy("locked"))
            for at, why in ((1.0, "the database is busy"), (99.0, "locked")):
                self.assertFalse(trouble.survives(at, busy))
                self.assertEqual(pybgworker.health_of(worker).trouble, why)
            busy.side_effect = None
            trouble.survives(100.0, busy)
            self.assertEqual(pybgworker.health_of(worker).trouble, "")
            worker.senses.stops.count = 1
            self.assertEqual(pybgworker.health_of(worker).trouble, "it is stopping")
        worker.senses.close()

    def test_a_worker_says_which_tasks_it_knows(self):
        """Also callbacks, which are tasks of their own."""
        self.tasks = self.module("""
            def bad(id, error): pass

            @task(rate_limit="2/s", on_failure=bad, max_running=4)
            def send(to, *cc, body="", **more): pass
        """)
        self.worker()
        self.wait_row(state="ready")
        known, callback = self.store.known_tasks()
        self.assertEqual(known, (
            self.row().id, "tasks.send", 2, ("to", "*cc", "body", "**more"), 4))
        self.assertEqual(callback.name, "tasks.send:on_failure")

    @unittest.skipUnless(sys.platform == "linux", "by /proc")
    def test_a_worker_says_what_it_and_its_children_use(self):
        worker = self.worker("--concurrency", 1, "--heartbeat-interval", 0.1)
        self.tasks.hold.delay()
        busy = seen(lambda: [c for c in self.store.children() if c.running and c.cpu])
        self.assertIn(busy[0].pid, worker.children())
        self.assertGreater(busy[0].memory, 1 << 20)
        self.assertGreater(busy[0].cpu, 0)
        row = self.row()
        self.assertGreater(row.memory, 1 << 20)
        self.assertGreater(row.cpu, 0)
        self.assertGreater(row.children_cpu, 0)
        (self.folder / "go").touch()
        seen(lambda: not any(c.running for c in self.store.children()))
        before = self.row().children_cpu
        os.kill(busy[0].pid, signal.SIGKILL)
        seen(lambda: busy[0].pid not in [c.pid for c in self.store.children()])
        self.assertGreaterEqual(self.row().children_cpu, before)
        worker.stop()
        own, childrens = self.store.departed_cpu()
        self.assertGreater(own, row.cpu)
        self.assertGreaterEqual(childrens, before)

    def test_a_worker_says_that_children_cannot_start(self):
        self.tasks = self.module("""
            import os
            if os.path.exists("broken"):
                raise ImportError("no module named stripe")

            @task
            def get(): return os.getpid()
        """)
        worker = self.worker("--start-method", "spawn", "--concurrency", 1)
        self.wait_row(state="ready")
        (self.folder / "broken").touch()
        os.kill(self.get(self.tasks.get.delay()), signal.SIGKILL)
        self.wait_row(note="cannot start children: ImportError: no module named stripe")
        (self.folder / "broken").unlink()
        self.wait_row(note=None)
        worker.stop()

    def told(self):
        """What was written in bg_run and bg_output since the call of watch()."""
        return [what for what, in self.sql("select what from told")]

    def watch(self):
        self.store.create()
        self.sql("create table told (what text)")
        for table in ("bg_run", "bg_output"):
            self.sql(f"create trigger {table}_told after insert on {table} begin "
                     f"insert into told values ('{table} ' || new.task); end")

    def test_nothing_is_told_of_runs_while_they_are_short(self):
        self.watch()
        self.tasks.add.delay_many([(n, 1) for n in range(3000)])
        self.worker("--burst", "--concurrency", 2).wait()
        self.assertEqual(self.told(), [])

        hold = self.tasks.hold.delay()              # it would be seen if it were
        self.worker("--concurrency", 1)
        seen(self.told)
        seen(lambda: self.store.runs())
        (self.folder / "go").touch()
        self.get(hold)
        self.assertEqual(self.told(), [f"bg_run {hold.id}"])
        self.assertEqual(self.store.runs(), [])

    def test_what_runs_and_what_it_prints_can_be_seen_meanwhile(self):
        self.tasks = self.module(TELLING)
        self.worker("--concurrency", 1)
        result = self.tasks.tell.delay("a\x1b", "go1")
        row = seen(lambda: next(iter(self.store.runs()), None))
        child, = [c for c in self.store.children() if c.running] \
            or seen(lambda: [c for c in self.store.children() if c.running])
        self.assertEqual((row.task, row.attempt, row.pid, row.behind),
                         (result.id, 1, child.pid, None))
        self.assertLess(abs(row.began_at - self.store.now()), 60_000)
        live = seen(lambda: self.store.live_output(result.id, 1))
        self.assertEqual("".join(part.body for part in live), "a\x1b begins\n")
        (self.folder / "go1").touch()
        self.get(result)
        self.assertEqual(self.store.output(result.id), "a\x1b begins\na\x1b ends\n")
        self.assertEqual((self.store.runs(), self.store.live_output(result.id, 1)), ([], []))

    def test_a_hundred_that_run_beside_each_other_are_told_each(self):
        self.tasks = self.module(TELLING)
        self.worker("--concurrency", 1, "--coroutines", 100)
        results = [self.tasks.atell.delay(str(n), "go") for n in range(100)]
        seen(lambda: len(self.store.runs()) == 100)
        ids = [result.id for result in results]
        seen(lambda: all(self.store.live_output(id, 1) for id in ids))
        for n, id in enumerate(ids):
            self.assertEqual(self.store.live_output(id, 1)[0].body, f"{n} begins\n")
        (self.folder / "go").touch()
        for n, result in enumerate(results):
            self.get(result)
            self.assertEqual(self.store.output(result.id), f"{n} begins\n{n} ends\n")
        self.assertEqual(self.store.runs(), [])

    def test_threads_are_told_each(self):
        self.tasks = self.module(TELLING)
        self.worker("--concurrency", 1, "--threads", 3)
        results = [self.tasks.tell.delay(str(n), "go") for n in range(3)]
        seen(lambda: len(self.store.runs()) == 3)
        for n, result in enumerate(results):
            live = seen(lambda: self.store.live_output(result.id, 1))     # noqa: B023
            self.assertEqual(live[0].body, f"{n} begins\n")
        (self.folder / "go").touch()
        for result in results:
            self.get(result)

    def test_the_last_lines_of_a_run_survive_the_kill_of_its_worker(self):
        self.tasks = self.module(TELLING)
        worker = self.worker("--concurrency", 1)
        result = self.tasks.tell.delay("one", "never")
        seen(lambda: self.store.live_output(result.id, 1))
        worker.kill()
        other = self.worker("--concurrency", 1, "--queues", "elsewhere")
        other.wait_for("task_lost", task_id=result.id)
        self.assertEqual(self.store.output(result.id), "one begins\n")
        self.assertEqual((self.store.runs(), self.store.live_output(result.id, 1)), ([], []))

    def test_what_is_printed_while_the_database_is_locked_is_told_later(self):
        self.tasks = self.module(TELLING)
        self.worker("--concurrency", 1)
        result = self.tasks.tell.delay("one", "go1", "go2")
        seen(lambda: self.store.live_output(result.id, 1))
        lock = sqlite3.connect(self.db, isolation_level=None)
        lock.execute("begin immediate")
        (self.folder / "go1").touch()
        self.wait_lines("told", 2)
        for _ in range(3):                  # the worker meets the lock
            before = self.row().beat_at
            self.assertEqual(before, self.row().beat_at)
        lock.execute("rollback")
        lock.close()
        seen(lambda: "".join(row.body for row in self.store.live_output(result.id, 1))
              == "one begins\none ends\n")
        (self.folder / "go2").touch()
        self.get(result)
        self.assertEqual(self.store.output(result.id), "one begins\none ends\n")

    def test_a_run_that_prints_much_is_told_to_its_last_line(self):
        """Although its child sends only a part; and the line is not its last step."""
        self.tasks = self.module(TELLING)
        self.worker("--concurrency", 1)
        result = self.tasks.storm.delay()

        def whole():
            return pybgworker.kept_of(self.store.live_output(result.id, 1)).text()

        seen(lambda: whole().endswith("\nlast line\n"))
        sent = "".join(f"{n}\n" for n in range(20_000)) + "last line\n"
        cut = pybgworker.cut_mark(len(sent) - 64_000)
        self.assertEqual(whole(), sent[:32_000] + cut + sent[-32_000:])
        (self.folder / "go").touch()
        self.get(result)
        line = "y" * 1_000_000 + "\n"
        whole = sent + line
        self.assertEqual(
            self.store.output(result.id),
            whole[:32_000] + pybgworker.cut_mark(len(whole) - 64_000) + whole[-32_000:])

    def test_who_was_given_up_tells_of_its_new_runs_only(self):
        self.tasks = self.module(TELLING)
        worker = self.worker("--concurrency", 1, "--heartbeat-interval", 0.2)
        result = self.tasks.tell.delay("one", "go1")
        first = seen(lambda: next(iter(self.store.runs()), None))
        self.store.reap(first.worker, "w", self.store.now())
        again = seen(lambda: next(iter(self.store.runs()), None))
        self.assertEqual((again.task, again.attempt), (result.id, 2))
        self.assertNotEqual(again.worker, first.worker)
        seen(lambda: self.store.live_output(result.id, 2))
        self.assertEqual(self.store.live_output(result.id, 1), [])
        self.assertEqual(self.wait_row(state="ready").id, again.worker)
        (self.folder / "go1").touch()
        self.get(result)
        worker.stop()

    def test_trouble_with_the_database_is_told_since_when(self):
        pool = mock.Mock(members=[], **{"crew.starts.trouble": ""})
        store = mock.Mock(path="/a/q.db", **{"now.return_value": 1_700_000_000_500})
        signs = pybgworker.Signs(store, pool)
        full = "database /a/q.db: database or disk is full: free some disk space"
        self.assertFalse(signs.look("", 0.0, 50.0))
        self.assertTrue(signs.look(full, 30.5, 50.0))
        self.assertEqual(signs.note, "cannot write since 22:13:01 UTC: database or disk "
                         "is full: free some disk space")
        store.now.return_value += 60_123        # the same episode
        self.assertFalse(signs.look(full, 30.5, 110.0))
        self.assertTrue(signs.look("", 30.5, 110.0))
        self.assertIsNone(signs.note)
        pool.crew.starts.trouble = "x" * 1000
        self.assertTrue(signs.look("", 0.0, 50.0))
        self.assertEqual(len(signs.note), 300)


# == Household ================================================================

class Households(unittest.TestCase):
    def household(self, start_over=None, **liveness):
        settings = pybgworker.types.SimpleNamespace(heartbeat_interval=5.0, concurrency=1)
        return pybgworker.Household(
            mock.Mock(), settings, mock.Mock(), mock.Mock(news=False),
            mock.Mock(**liveness), mock.Mock(members=[], **{
                "running.return_value": [], "crew.nursery.process": None}), start_over)

    def test_who_was_taken_for_dead_starts_over(self):
        over = mock.Mock()
        for alive, calls in ((True, []), (False, [mock.call(7)])):
            house = self.household(over, **{"beat.return_value": alive})
            house._beat(7)
            self.assertEqual(over.mock_calls, calls)

    def test_the_runs_of_the_dead_are_news(self):
        """Also those that had not begun; but of these nothing is said."""
        lost = pybgworker.LostRun(1, "t", 1, 2, "w")
        for found, is_behind, pause in (([], False, None), ([lost], True, 0.05),
                                        ([lost._replace(begun=False)], True, 0.05)):
            house = self.household(**{"reap_dead.return_value": found,
                                      "is_behind": is_behind})
            self.assertEqual(house._reap(7), pause)
            self.assertEqual(house._lookout.news, bool(found))
            self.assertEqual(house._journal.lost.mock_calls,
                             [mock.call(lost)] if found == [lost] else [])

    def test_only_what_is_punctual_is_worth_waking_for(self):
        house = self.household()
        self.assertEqual(house.next_due(), float("inf"))
        house.chores.append(pybgworker.Chore(1.0, mock.Mock(), is_punctual=True))
        house.chores[-1].due = 17.0
        self.assertEqual(house.next_due(), 17.0)


# == Worker ===================================================================


class Workers(Served):

    def started(self, **settings):
        """A worker in this process, driven by hand."""
        self.app.tasks.update(pybgworker.default_app.tasks)
        self.app.override(concurrency=1, **settings)
        worker = self.worker_here()
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        os.chdir(self.folder)
        worker.start()
        self.addCleanup(worker.stop)
        return worker

    def test_a_stop_starts_no_child(self):
        """Not even in the place of one that says only now that it is ready."""
        worker = self.started()
        until(lambda: all(pybgworker.select.select([member.wire.messages], [], [], 0)[0]
                          for member in worker.pool.members))
        with mock.patch.object(worker.pool, "in_hand", return_value=1), \
                mock.patch.object(pybgworker, "spawn", side_effect=OSError) as spawn:
            worker.stop()
        spawn.assert_not_called()

    def crons(self, worker):
        """The chore that fires schedules."""
        return next(chore for chore in worker.house.chores if chore.is_punctual)

    def turn_until(self, worker, predicate, now=pybgworker.now_ms):
        def turn():
            heard = worker.wait()
            worker.step(now(), heard)
            return predicate()
        until(turn)

    def test_step_takes_the_time_from_its_caller(self):
        worker = self.started()
        later = self.tasks.add.options(countdown=3600).delay(1, 2)
        self.turn_until(worker, lambda: worker.is_ready)
        self.assertEqual(later.status, "scheduled")

        self.turn_until(worker, later.ready, lambda: pybgworker.now_ms() + 3_600_000)
        self.assertEqual(later.result, 3)

    def set_the_clock(self, hours):
        """The wall clock of this process, from now on off by so much."""
        real = pybgworker._real_now_ms = getattr(
            pybgworker, "_real_now_ms", pybgworker.now_ms)
        self.addCleanup(setattr, pybgworker, "now_ms", real)
        pybgworker.now_ms = lambda: real() + hours * 3_600_000
        return lambda: pybgworker.now_ms()

    def test_a_clock_set_while_a_task_runs_neither_hurries_nor_saves_it(self):
        worker = self.started()
        for hours in (1, -1):
            clock = self.set_the_clock(0)
            slow = self.tasks.nap.options(timeout=600).delay(0.3)
            self.turn_until(worker, lambda: self.lines("nap"), clock)
            clock = self.set_the_clock(hours)
            self.turn_until(worker, slow.ready, clock)
            self.assertEqual(slow.error, None)
            os.remove("nap")

            stuck = self.tasks.stuck_in_c.delay()
            self.turn_until(worker, lambda: self.lines("stuck"), clock)
            clock = self.set_the_clock(-hours)
            self.turn_until(worker, stuck.ready, clock)
            self.assertEqual(stuck.error.kind, "timeout")
            row = self.store.task(stuck.id)
            self.assertLess(abs(row.finished_at - row.started_at), 10_000)
            os.remove("stuck")

    def test_a_limit_and_a_countdown_wait_no_longer_when_the_clock_is_set_back(self):
        worker = self.started()
        worker.lookout._rates["tasks.add"] = 1 / 60
        clock = self.set_the_clock(0)
        first, second = [self.tasks.add.delay(1, n) for n in range(2)]
        self.turn_until(worker, first.ready, clock)
        later = self.tasks.echo.options(countdown=1).delay("x")
        self.turn_until(worker, lambda: worker.lookout.round.limited and worker.lookout.round.is_over,
                        clock)
        clock = self.set_the_clock(-1 / 12)
        self.turn_until(worker, lambda: second.ready() and later.ready(), clock)

    def test_a_clock_set_during_a_stop_neither_hurries_nor_prolongs_it(self):
        worker = self.started(shutdown_timeout=0.4)
        self.tasks.long_nap.delay(30)
        self.turn_until(worker, lambda: self.lines("nap"))
        worker.senses.stops.count, began = 1, time.monotonic()
        worker.step(pybgworker.now_ms())
        for hours in (1, -1):
            self.set_the_clock(hours)
            self.assertFalse(worker._is_done())
        until(lambda: worker.step(pybgworker.now_ms()) or worker._is_done(), 5)
        self.assertLess(0.4, time.monotonic() - began)

    def test_a_turn_that_can_do_nothing_is_not_due(self):
        """Something falls due while all children are busy, or during a stop."""
        worker = self.started()
        self.tasks.nap.delay(0.6)
        self.wait_for_start(worker)
        due = self.tasks.add.options(countdown=0.01).delay(1, 2)
        limited = self.tasks.limited.delay_many([()] * 30)
        turns, end = 0, time.monotonic() + 0.4
        while time.monotonic() < end:
            heard = worker.wait()
            worker.step(pybgworker.now_ms(), heard)
            turns += 1
        self.assertLess(turns, 30)
        self.turn_until(worker, due.ready)              # at once when there is room
        row = self.store.task(due.id)
        nap = self.store.tasks(name="tasks.nap")[0]
        self.assertLess(row.started_at - nap.finished_at, 80)
        self.turn_until(worker, limited[25].ready)

        self.tasks.nap.delay(0.6)
        until(lambda: worker.step(pybgworker.now_ms()) or worker.pool.running())
        self.tasks.add.options(countdown=0.01).delay(1, 2)
        worker.lookout.next_at = pybgworker.now_ms() + 10       # it has seen it
        worker.senses.stops.count, turns, end = 1, 0, time.monotonic() + 0.3
        while time.monotonic() < end:
            heard = worker.wait()
            worker.step(pybgworker.now_ms(), heard)
            turns += 1
        self.assertLess(turns, 30)

    def test_the_end_of_a_stops_patience_needs_no_poll(self):
        worker = self.started()
        self.tasks.nap.delay(5)
        self.wait_for_start(worker)
        worker.settings.shutdown_timeout = 0.3
        worker.senses.stops.count = 1
        with mock.patch.object(pybgworker, "_POLL_SECONDS", 60):
            worker.step(pybgworker.now_ms())
            self.assertLess(worker._patience(), 0.31)
        worker.stop_by = time.monotonic() - 1
        self.assertEqual(worker._patience(), 0)

    def prefetched(self, worker):
        """As many runs of step_of() as may be are claimed; some have begun."""
        self.turn_until(worker, lambda: worker.is_ready)
        worker.pool.durations.__init__()        # nothing is known but that they are short
        worker.pool.durations.learn("tasks.step_of", 0.0001)
        worker.pool.durations.learn("tasks.urgent_twice", 0.0001)
        results = self.tasks.step_of.delay_many([(n,) for n in range(150)])
        self.turn_until(worker, lambda: worker.pool.in_hand() > 100
                        and self.lines("steps"))
        return results

    def test_an_urgent_task_does_not_wait_for_what_was_prefetched(self):
        worker = self.started()
        for name in ("urgent", "urgent_twice"):     # needs a free child, and does not
            with self.subTest(name):
                results = self.prefetched(worker)
                before = len(self.lines("steps"))
                urgent = getattr(self.tasks, name).options(priority=1).delay()
                self.turn_until(worker, urgent.ready)
                place = self.lines("steps").index("urgent")
                self.assertLess(place - before, 30)
                self.turn_until(worker, lambda results=results: all(
                    r.ready() for r in results[-3:]))
                self.assertEqual({r.attempt for r in results}, {1})
                os.remove("steps")

    def test_what_no_child_can_take_is_handed_back_without_a_poll(self):
        """Behind a head that hangs, which was short so far."""
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        with mock.patch.object(pybgworker, "_POLL_SECONDS", 60.0):
            worker.pool.durations.learn("tasks.hold", 0.0001)
            worker.pool.durations.learn("tasks.add", 0.0001)
            self.tasks.hold.delay()
            behind = self.tasks.add.delay(1, 2)
            self.turn_until(worker, lambda: worker.pool.in_hand() == 2)
            self.turn_until(worker, lambda: self.store.task(behind.id).attempt == 0
                            and behind.status == "queued")
        Path("go").touch()
        self.turn_until(worker, behind.ready)

    def test_a_stop_says_how_many_it_has_handed_back(self):
        worker = self.started()
        self.prefetched(worker)
        worker.senses.stops.count = 1
        claimed = {id for id, in self.sql("select id from bg_task where state = 3")}
        self.turn_until(worker, lambda: worker._is_done())
        back = {id for id, in self.sql("select id from bg_task where state = 2")}
        self.assertGreater(len(claimed & back), 50)
        self.assertEqual(worker.outbox.handed_back, len(claimed & back))

    def test_a_pause_recalls_what_has_not_begun(self):
        worker = self.started()
        results = self.prefetched(worker)
        self.store.pause("default", self.now)
        self.turn_until(worker, lambda: not worker.pool.in_hand()
                        and not worker.outbox.is_full)
        self.assertLess(len(self.lines("steps")), 60)
        self.assertEqual({r.status for r in results}, {"success", "queued"})
        self.store.resume("default")
        self.turn_until(worker, lambda: all(r.ready() for r in results[-3:]))
        self.assertEqual({r.attempt for r in results}, {1})

    def test_a_worker_learns_that_it_was_given_up_before_it_claims(self):
        """After a stall: what it would claim must neither be killed nor fail."""
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        old = worker.liveness.id
        self.sql("delete from bg_worker")
        result = self.tasks.once.delay("x")
        worker.house.chores = []                  # also without a heartbeat
        worker.lookout.news = True                  # its address went with its row
        self.turn_until(worker, result.ready)
        self.assertEqual((result.status, result.attempt), ("success", 1))
        self.assertNotEqual(worker.liveness.id, old)

        self.tasks.long_nap.delay(30)       # one in hand is given up, as is its worker
        self.turn_until(worker, lambda: self.lines("nap"))
        self.sql("update bg_task set state = 2 where state = 3")
        self.sql("delete from bg_worker")
        again = self.tasks.once.options(priority=1).delay("y")
        worker.lookout.news = True
        worker.house._beat(pybgworker.now_ms())
        self.turn_until(worker, again.ready)
        self.assertEqual((again.status, again.attempt), ("success", 1))

    def test_an_outcome_is_kept_while_the_database_is_locked(self):
        worker = self.started()
        result = self.tasks.nap.delay(0.4)
        self.wait_for_start(worker)
        other = sqlite3.connect(self.db, isolation_level=None)
        other.execute("begin immediate")
        self.turn_until(worker, lambda: worker.outbox.outcomes)
        other.execute("rollback")
        other.close()
        self.turn_until(worker, result.ready)
        self.assertEqual(result.result, "slept")

    def test_a_worker_that_was_given_up_claims_nothing_and_starts_over(self):
        """A run with retries=0, claimed and killed, would have failed."""
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        before = worker.liveness.id
        self.store.reap(before, "w", pybgworker.now_ms())
        for chore in worker.house.chores:             # it has not beaten since
            chore.due = time.monotonic() + 3600
        members, cells = list(worker.pool.members), worker.liveness.begun.fd
        result = self.tasks.add.options(retries=0).delay(1, 2)
        self.turn_until(worker, result.ready)
        self.assertEqual((result.result, result.attempt), (3, 1))
        self.assertNotEqual(worker.liveness.id, before)
        # The children of before would mark cells that nobody reads.
        self.assertEqual(set(members) & set(worker.pool.members), set())
        worker.liveness.forsake()
        begun = pybgworker.read_begun(self.store.path, worker.liveness.id)
        self.assertEqual(begun, (False, None) if cells >= 0 else (True, None))

    def test_what_may_run_once_waits_in_pipes_only_where_cells_say_what_had_begun(self):
        for place in ("ext4", "nfs"):
            with mock.patch.object(pybgworker, "file_system", lambda _: place):  # noqa: B023
                worker = self.started()
            self.turn_until(worker, lambda: worker.is_ready)            # noqa: B023
            order = worker._order(worker.pool.balance(time.monotonic()))
            self.assertEqual(order.proves_begun, worker.liveness.begun.is_kept)
            if place == "nfs":
                self.assertFalse(order.proves_begun)

    def wait_for_start(self, worker):
        self.turn_until(worker, lambda: self.lines("nap"))

    def test_a_full_disk_stops_nothing_and_loses_nothing(self):
        worker = self.started()
        result = self.tasks.nap.delay(0.05)
        self.wait_for_start(worker)
        link = self.store.db.link()
        size = link.connection.execute("pragma page_count").fetchone()[0]
        link.connection.execute(f"pragma max_page_count = {size}").fetchall()
        with self.assertRaisesRegex(pybgworker.DatabaseUnavailable, "free some disk"):
            while True:
                self.app.send("t", "x" * 900)
        for _ in range(30):
            heard = worker.wait()
            worker.step(pybgworker.now_ms(), heard)
        link.connection.execute("pragma max_page_count = 1000000").fetchall()
        self.turn_until(worker, result.ready)
        self.assertEqual(result.result, "slept")

    def test_what_cannot_be_written_does_not_stop_the_heartbeat(self):
        """A result that is larger than what is left of the disk; a lost table."""
        worker = self.started(heartbeat_interval=0.02)
        worker.house.trouble._say = lambda event, **_: said.append(event)
        said, result = [], self.tasks.big.delay("x" * 200_000)
        until(lambda: worker.pool.receive(worker.wait().children, 0)
              or worker.step(pybgworker.now_ms()) or worker.pool.running())
        link = self.store.db.link()
        size = link.connection.execute("pragma page_count").fetchone()[0]
        link.connection.execute(f"pragma max_page_count = {size}").fetchall()
        self.turn_until(worker, lambda: worker.outbox.outcomes)

        def beats():
            return self.store.workers()[0].beat_at

        for _ in range(3):
            before = beats()
            self.turn_until(worker, lambda before=before: beats() > before)
        self.assertEqual(result.status, "running")
        self.assertEqual(said, ["database_error"])
        link.connection.execute("pragma max_page_count = 1000000").fetchall()
        self.turn_until(worker, result.ready)
        self.assertFalse(worker.house.trouble.failing)

        self.sql("alter table bg_schedule rename to gone")
        self.crons(worker).due = 0
        self.turn_until(worker, lambda: self.crons(worker).act_now
                        in worker.house.trouble.failing)
        before = beats()
        self.turn_until(worker, lambda: beats() > before)
        self.assertEqual(self.tasks.add.delay(1, 2).status, "queued")
        self.sql("alter table gone rename to bg_schedule")
        self.turn_until(worker, lambda: not worker.house.trouble.failing)
        self.assertEqual(said, ["database_error"] * 2)

    def test_an_episode_of_trouble_is_said_once(self):
        worker, said = self.started(heartbeat_interval=0.02), []
        worker.house.trouble._say = lambda event, **_: said.append(event)
        self.addCleanup(setattr, pybgworker, "_BUSY_SILENCE", pybgworker._BUSY_SILENCE)
        pybgworker._BUSY_SILENCE = 0.5
        other = sqlite3.connect(self.db, isolation_level=None)
        for episode in (1, 2):
            other.execute("begin immediate")
            end = time.monotonic() + 2
            while time.monotonic() < end:
                heard = worker.wait()
                worker.step(pybgworker.now_ms(), heard)
            self.assertEqual(said.count("heartbeat_error"), episode)
            self.assertEqual(said.count("database_error"), episode)
            other.execute("rollback")
            self.turn_until(worker, lambda: not worker.house.trouble.failing)
        other.close()

    def test_a_chore_that_failed_is_tried_again_soon_and_keeps_no_other_waiting(self):
        done, trouble = [], pybgworker.Trouble(lambda *_, **__: None)

        def fail(now):
            done.append("bad")
            raise pybgworker.DatabaseUnusable("no")

        chore = pybgworker.Chore(3600, fail)
        trouble.do_chores([chore], 0, 1000.0)
        self.assertLess(chore.due, 1001)
        trouble.do_chores([chore], 0, 1000.05)
        self.assertTrue(trouble.failing)        # not due is not well
        chore.act = done.append
        trouble.do_chores([chore], 7, 1000.2)
        self.assertEqual((done, chore.due), (["bad", 7], 4600.2))
        self.assertFalse(trouble.failing)

        worker, done = self.started(), []
        worker.house.chores = [pybgworker.Chore(0, fail), pybgworker.Chore(0, fail),
                         pybgworker.Chore(0, lambda now: done.append("good"))]
        for _ in range(3):
            worker.step(pybgworker.now_ms())
        self.assertIn("good", done)

    def test_an_error_at_any_statement_of_a_turn_loses_nothing(self):
        worker = self.started()
        other = SqliteStore(str(self.db))
        self.addCleanup(other.close)
        self.turn_until(worker, lambda: worker.is_ready)
        for n in range(1, 45):
            results = [self.tasks.add.delay(n, 1), self.tasks.flaky.delay()]
            link = self.store.db.link()
            link.connection = failing = Faults.Failing(link.connection, n)
            self.turn_until(worker, lambda: {other.state(r.id) for r in results} == {4})
            link.connection = failing.real
            with self.subTest(n):
                self.assertLessEqual(failing.left, 0, "the fault did not come")
                self.assertEqual([r.result for r in results], [n + 1, 3])
                self.assertEqual([r.attempt for r in results], [1, 3])

    def test_no_end_stays_out_of_history_when_nothing_else_happens(self):
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        results = self.tasks.add.delay_many([(n, n) for n in range(200)])
        due = []

        def is_done():
            due.append(worker.outbox.tally.next_due)
            return all(result.ready() for result in results)

        self.turn_until(worker, is_done)
        self.turn_until(worker, lambda: worker.outbox.tally.next_due == math.inf)
        row, = self.store.totals()
        self.assertEqual((row.runs, row.succeeded, sum(row.ran), sum(row.waited)),
                         (200, 200, 200, 200))

        worker.outbox.tally._due = time.monotonic() + 0.05
        worker.outbox.tally._kept.add_lost(self.claim_one(worker), pybgworker.FAILED)
        self.assertLessEqual(worker._patience(), 0.05)

    def test_history_is_rolled_up_by_a_worker(self):
        worker = self.started()
        with self.store.db.write() as link:
            pybgworker.add_history(link.connection, counts_of(7), Histories.START * 1000)
        # The clock that it goes by is ours; a leap of less than an hour is no doubt.
        prune = worker.house._prune
        with mock.patch.object(pybgworker, "now_ms",
                               return_value=(Histories.START + 1500) * 1000):
            self.sql("delete from bg_meta where name like 'clock%'")
            self.assertEqual(prune(pybgworker.now_ms()), 0.1)
            self.assertIsNone(prune(pybgworker.now_ms()))
        self.assertEqual(self.sql("select sum(runs) from bg_history where span = 900"),
                         [(7,)])
        worker.house.upkeep.is_in_doubt = True      # it would be rows that are too old
        self.assertFalse(worker.house.upkeep.roll_up((Histories.START + 99_000) * 1000))
        worker.house.upkeep.is_in_doubt = False
        self.assertTrue(worker.house.upkeep.roll_up((Histories.START + 99_000) * 1000))

    def test_a_turn_that_finishes_and_claims_takes_few_statements(self):
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        self.tasks.add.delay_many([(1, n) for n in range(40)])
        self.turn_until(worker, lambda: worker.store.cancels_asked(0) == []
                        and len(worker.store.finished_runs(99)) >= 40)
        done = [pybgworker.Outcome(self.claim_one(worker), pybgworker.SUCCESS, "1")
                for _ in range(20)]
        self.tasks.add.delay_many([(2, n) for n in range(20)])
        worker.outbox.outcomes, found = done, []
        connection = self.store.db.link().connection
        connection.set_trace_callback(found.append)
        at = time.monotonic()
        worker._transact(worker.pool.balance(at), pybgworker.now_ms(), at)
        connection.set_trace_callback(None)
        claimed = len(worker.pool.hand)
        self.assertGreater(claimed, 10)
        self.assertLessEqual(len(found), len(done) + claimed + 14, found)

    def claim_one(self, worker):
        self.tasks.add.delay(0, 0)
        order = worker._order(worker.pool.balance(time.monotonic()))._replace(free=1, ahead=0)
        turn = pybgworker.Turn(order.worker, order=order)
        return self.store.turn(turn, self.now, 5.0).claimed.runs[0]

    def test_a_worker_that_hears_no_wake_up_looks_by_itself(self):
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        self.crons(worker).due = time.monotonic() + 3600     # a tick would be news
        worker.senses.selector.unregister(worker.senses.ear.socket)
        worker.senses.ear.close()
        result = self.tasks.add.delay(1, 2)
        self.turn_until(worker, result.ready)
        self.assertEqual(result.result, 3)

    def test_what_a_worker_puts_there_itself_it_looks_for_without_a_hint(self):
        """Its own commits do not move the data_version that it sees."""
        def reap(worker, later):
            with self.store.db.write() as link:
                link.connection.execute(
                    "update bg_task set state = 3, worker = 4711, attempt = 1"
                    " where id = ?", (later.id,))
            worker.house._reap(pybgworker.now_ms())

        def fire(worker, later):
            with self.store.db.write() as link:
                link.connection.execute(
                    "update bg_schedule set next_tick = 1700000100,"
                    " done = '[[1700000040, 1700000040]]'")
            self.crons(worker).act(pybgworker.now_ms())

        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        for act, name in ((reap, "tasks.add"), (fire, "tasks.tick")):
            later = self.tasks.add.options(countdown=3600).delay(1, 2)
            for chore in worker.house.chores:         # not by a chore of the turn
                chore.due = time.monotonic() + 3600
            self.turn_until(worker, lambda: worker.lookout.next_at
                            and not worker.lookout.news)
            with self.subTest(name), mock.patch.object(pybgworker, "send_wake_ups"):
                act(worker, later)
                self.turn_until(worker, lambda name=name: [
                    row for row in self.store.tasks(name=name) if row.status == "success"])

    def test_what_is_to_be_handed_back_waits_for_nothing(self):
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        run = self.claim_one(worker)
        self.turn_until(worker, lambda: worker._patience() > 0)
        worker.outbox.returned.append(run)
        self.assertEqual(worker._patience(), 0.0)
        self.turn_until(worker, lambda: self.store.task(run.id).status == "success")
        self.assertEqual(self.store.task(run.id).attempt, 1)

    def test_what_a_turn_queues_itself_is_news_to_its_look(self):
        """Or it waits for the next round, behind where this one stands."""
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        run = self.claim_one(worker)
        row = (pybgworker.NewTask("t:on_failure", "q", 5, None, 0, None, 2, 0, 0), "[[],{}]")
        for of, again in (
            ({}, False),
            ({"returned": [run]}, True),
            ({"outcomes": [pybgworker.Outcome(run, 5, then=(row,))]}, True),
            ({"outcomes": [pybgworker.Outcome(run, 5)]}, False),
        ):
            self.turn_until(worker, lambda: not worker.lookout.news)
            worker.lookout.round = pybgworker.Round(after=("q", "t"))
            worker.outbox.clear()
            for name, value in of.items():
                setattr(worker.outbox, name, value)
            orders = []
            worker.outbox.turn = lambda *values, at: orders.append(
                values[-1]) or mock.Mock(claimed=None)
            at = time.monotonic()
            places = worker.pool.balance(at)
            with self.subTest(**of), \
                    mock.patch.object(worker, "_wants", return_value=True):
                worker._transact(places, pybgworker.now_ms(), at)
                self.assertEqual([order.round.again for order in orders], [again])
            del worker.outbox.turn
            worker.outbox.clear()

    def test_a_cancellation_is_heard_with_its_hint(self):
        worker = self.started()
        result = self.tasks.long_nap.delay(30)
        self.wait_for_start(worker)
        worker.heeding.due = time.monotonic() + 3600
        result.cancel()
        self.turn_until(worker, result.ready)
        self.assertTrue(result.cancelled())

    def test_what_is_left_over_of_a_chore_is_done_soon(self):
        """The next tick, more dead workers, more old tasks: not a period later."""
        worker = self.started()
        worker.house.upkeep = mock.Mock(**{"prune.return_value": True,
                                     "mind_clock.return_value": False})
        behind = mock.patch.multiple(pybgworker.Liveness, is_behind=True,
                                     reap_dead=lambda *_: [])
        tick = mock.patch.object(pybgworker.Scheduler, "fire", lambda *_: (False, 0.1))
        chores = {chore.act.__name__: chore for chore in worker.house.chores}
        for name in ("fire", "_prune", "_reap"):
            chore, now = chores[name], time.monotonic()
            with behind, tick, self.subTest(name):
                chore.act_now(pybgworker.now_ms(), now)
                self.assertLess(chore.due - now, 0.45)

    def test_a_worker_that_starts_over_forgets_what_became_of_its_runs(self):
        """They are somebody else's now; nothing is written or said of them."""
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        run = self.claim_one(worker)
        end = pybgworker.Ended(run, "success", "1")
        worker.outbox.settle([end], pybgworker.now_ms())
        worker.outbox.returned.append(run)
        worker.pool._ended.append(end)
        worker._start_over(pybgworker.now_ms())
        self.assertEqual((worker.outbox.is_full, worker.pool._ended), (False, []))

    # How the only child that works becomes free, or is replaced.
    FREED = {
        "end": lambda case, worker, held: (case.folder / "go").touch(),
        "crash": lambda case, worker, held: os.kill(case.busy(worker).process.pid, 9),
        "both crash": lambda case, worker, held: [
            os.kill(member.process.pid, 9) for member in worker.pool.members],
        "cancel": lambda case, worker, held: held.cancel(),
        "time limit": lambda case, worker, held: [
            setattr(case.busy(worker).waiting[0], "timeout", 0.01),
            worker.pool._mark(case.busy(worker))],
        "retired": lambda case, worker, held: [
            setattr(worker.settings, "max_tasks_per_child", 1),
            (case.folder / "go").touch()],
    }

    def busy(self, worker):
        return next(member for member in worker.pool.members if member.waiting)

    def test_who_waits_for_a_child_starts_when_one_becomes_free_whatever_freed_it(self):
        patient = mock.patch.multiple(pybgworker, _POLL_SECONDS=60, STALL_SECONDS=60)
        for how, free in self.FREED.items():
            with self.subTest(how), patient:
                worker = self.started()
                self.turn_until(worker, lambda: all(m.ready for m in worker.pool.members))
                worker.pool.durations.short_names.add("tasks.hold")
                held = self.tasks.hold.options(retries=0).delay()
                self.turn_until(worker, lambda: self.lines("held"))
                waits = self.tasks.once.delay(how)      # needs a free child
                self.turn_until(worker, lambda: not worker.lookout.news)
                self.assertEqual(waits.status, "queued")

                freed_at = time.monotonic()
                free(self, worker, held)
                self.turn_until(worker, waits.ready)
                self.assertLess(time.monotonic() - freed_at, 5)
                worker.stop()
                for name in ("go", "held"):
                    (self.folder / name).unlink(missing_ok=True)

    def test_who_waits_for_the_end_of_a_run_elsewhere_starts_at_once(self):
        """However that came about; nobody looks by himself."""
        other = self.worker("--queues", "b")
        ends = {
            "done": lambda held: (self.folder / "b done").touch(),
            "cancelled": lambda held: held.cancel(),
            "crashed": lambda held: [os.kill(pid, 9) for pid in other.children()],
        }
        with mock.patch.multiple(pybgworker, _POLL_SECONDS=60):
            worker = self.started(queues=["a"])
            self.turn_until(worker, lambda: worker.is_ready)
            for how, end in ends.items():
                one = self.tasks.one_at_a_time
                held = one.options(queue="b", retries=0).delay(f"b {how}")
                until(lambda how=how: f"b {how}" in self.lines("began"))
                (self.folder / f"a {how}").touch()
                waits = one.options(queue="a").delay(f"a {how}")
                self.turn_until(worker, lambda: worker.lookout.round.limited
                                and not worker.lookout.news)
                with self.subTest(how):
                    self.assertEqual(waits.status, "queued")
                    ended_at = time.monotonic()
                    end(held)
                    self.turn_until(worker, waits.ready)
                    self.assertLess(time.monotonic() - ended_at, 5)

    # How the only place of a thread, or on a loop, becomes free.
    PLACE_FREED = {
        "end": lambda case, worker, held: (case.folder / "go").touch(),
        "crash": lambda case, worker, held: os.kill(case.laden(worker).process.pid, 9),
        "cancel": lambda case, worker, held: held.cancel(),
        "given back": lambda case, worker, held: [
            worker.pool._recall(case.laden(worker)), (case.folder / "go").touch()],
        "retired": lambda case, worker, held: [
            setattr(worker.settings, "max_tasks_per_child", 1),
            (case.folder / "go").touch()],
    }

    def laden(self, worker):
        return next(member for member in worker.pool.members if member.beside)

    def test_who_waits_for_a_place_beside_starts_when_one_becomes_free(self):
        """Whatever freed it, and without a poll."""
        tasks = self.module(NEIGHBOURS)
        for kind, waits_for, quick in (("coroutines", tasks.wait_for, tasks.wait),
                                       ("threads", tasks.block_for, tasks.block)):
            places = 1 if kind == "coroutines" else 2
            for how, free in self.PLACE_FREED.items():
                with self.subTest(kind, how=how), \
                        mock.patch.object(pybgworker, "_POLL_SECONDS", 60):
                    worker = self.started(**{"coroutines": 1, "threads": 1, kind: places})
                    self.turn_until(worker, lambda: len(worker.pool.members) == 2 and all(
                        m.ready for m in worker.pool.members))
                    held = [waits_for.delay("go") for _ in range(places)]
                    self.turn_until(worker, lambda: len(self.lines("begun")) >= places)
                    waits = quick.delay(0, "quick")
                    self.turn_until(worker, lambda: not worker.lookout.news)
                    self.assertEqual((waits.status, len(worker.pool.running())),
                                     ("queued", places))

                    freed_at = time.monotonic()
                    free(self, worker, held[0])
                    self.turn_until(worker, waits.ready)
                    self.assertLess(time.monotonic() - freed_at, 5)
                    (self.folder / "go").touch()
                    self.turn_until(worker, lambda: not worker.pool.in_hand())
                    worker.stop()
                    for name in ("go", "begun"):
                        (self.folder / name).unlink(missing_ok=True)

    def test_who_is_to_be_alone_starts_when_a_child_becomes_empty(self):
        """In one of two children something runs for long; the other becomes empty."""
        tasks = self.module(NEIGHBOURS)
        with mock.patch.object(pybgworker, "_POLL_SECONDS", 60):
            worker = self.started()
            self.turn_until(worker, lambda: len(worker.pool.members) == 2 and all(
                m.ready for m in worker.pool.members))
            first = tasks.wait_for.delay("first")
            self.turn_until(worker, lambda: self.lines("begun"))
            second = tasks.wait.delay(0)
            self.sql("update bg_task set alone = 1 where id = ?", second.id)
            self.turn_until(worker, second.ready)
            self.assertEqual(first.status, "running")
            (self.folder / "first").touch()
            self.turn_until(worker, first.ready)

    def test_all_that_run_are_counted_and_end_with_a_worker_that_was_given_up(self):
        tasks = self.module(NEIGHBOURS)
        worker = self.started(threads=3)
        self.turn_until(worker, lambda: worker.is_ready)
        results = [tasks.wait_for.delay("go") for _ in range(4)]
        results += [tasks.block_for.delay("go") for _ in range(3)]
        self.turn_until(worker, lambda: len(self.lines("begun")) == 7)
        worker.house._beat(pybgworker.now_ms())
        self.assertEqual(self.store.workers()[0].running, 7)
        pids = {int(pid) for pid in self.lines("begun")}
        self.store.reap(worker.liveness.id, "w", pybgworker.now_ms())
        worker.house._beat(pybgworker.now_ms())
        until(lambda: not any(map(is_alive, pids)), 5)
        self.assertEqual(worker.pool.in_hand(), 0)

    def test_what_a_task_enqueues_at_its_end_starts_at_once(self):
        with mock.patch.multiple(pybgworker, _POLL_SECONDS=60):
            worker = self.started(durability="normal")
            self.turn_until(worker, lambda: worker.is_ready)
            began = time.monotonic()
            for n in range(1, 21):      # soon its name is known to be short
                self.tasks.pass_on.delay(n)
                self.turn_until(worker, lambda: len(self.lines("ran")) >= 2 * n)
            self.assertLess(time.monotonic() - began, 10)
        names = collections.Counter(self.lines("ran"))
        self.assertEqual(set(names.values()), {1})

    def test_what_a_listener_enqueues_starts_at_once(self):
        def follow(event, fields):
            if event == "task_success" and len(results) < 3:
                results.append(self.tasks.add.delay(1, 2))

        self.app.override(concurrency=1)
        self.app.tasks.update(pybgworker.default_app.tasks)
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        os.chdir(self.folder)
        for is_deaf in (False, True):
            with self.subTest(is_deaf=is_deaf):
                results = [self.tasks.add.delay(1, 2)]
                with mock.patch.object(pybgworker._socket, "socket", side_effect=OSError) \
                        if is_deaf else contextlib.nullcontext():
                    worker = self.worker_here(burst=True)
                worker.journal.hear(follow)
                self.assertEqual(worker.run(), 0)
                self.assertEqual([r.status for r in results], ["success"] * 3)

    def test_an_unknown_task_waits_for_a_worker_that_knows_it(self):
        worker = self.started()
        stranger = self.app.send("elsewhere.task", 1)
        known = self.tasks.add.delay(1, 2)
        self.turn_until(worker, known.ready)
        self.assertEqual(stranger.status, "queued")

    def test_a_burst_does_not_leave_what_only_waits_for_its_rate(self):
        results = self.tasks.limited.delay_many([()] * 30)      # 20 a second
        later = self.tasks.add.options(countdown=60).delay(1, 2)
        self.assertEqual(self.worker("--burst").wait(), 0)
        self.assertEqual({r.status for r in results}, {"success"})
        self.assertEqual(later.status, "scheduled")

    def test_a_run_that_breaks_its_worker_is_charged_and_fails_in_the_end(self):
        result = self.tasks.hold.options(retries=1).delay()
        sys.path.insert(0, str(self.folder))
        self.addCleanup(sys.path.remove, str(self.folder))
        os.chdir(self.folder)
        self.app.tasks.update(pybgworker.default_app.tasks)
        self.app.override(concurrency=1)
        step = Worker.step

        def break_down(worker, *args):
            step(worker, *args)
            if len(self.lines("held")) == starts:
                raise MemoryError("what no code expects")

        for starts in (1, 2):
            worker = self.worker_here()
            with mock.patch.object(Worker, "step", break_down), \
                    self.assertRaises(MemoryError):
                worker.run()
            self.assertEqual((result.status, result.attempt), ("running", starts))
            self.assertEqual(list(self.folder.glob("queue.db-begun-*")), [])
        worker = self.started()
        self.turn_until(worker, result.ready)
        self.assertEqual(result.error.kind, "lost")
        self.assertEqual(len(self.lines("held")), 2)

    def test_a_tick_that_meets_a_lock_comes_as_soon_as_that_is_gone(self):
        for seconds in (0.1, 1.9):
            worker = self.started()
            self.turn_until(worker, lambda: worker.is_ready)
            self.sql("update bg_schedule set next_tick = 1, "
                     "done = '[[1700000040, 1700000040]]'")
            other = sqlite3.connect(self.db, isolation_level=None)
            other.execute("begin immediate")
            self.crons(worker).due = 0.0
            began, turns = time.monotonic(), 0
            while turns < 2 or time.monotonic() < began + seconds:
                worker.step(pybgworker.now_ms())
                turns += 1
            self.assertLess(time.monotonic() - began, seconds + 10)     # none waits long
            other.close()
            began = time.monotonic()
            self.turn_until(worker, lambda: self.sql("select 1 from bg_task"))
            self.assertLess(time.monotonic() - began, 1.5)
            self.sql("delete from bg_task")

    def test_a_retry_put_off_by_a_clock_that_was_ahead_comes_when_it_is_right(self):
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        for early in (True, False):         # the clock is set before or during the run
            clock = self.set_the_clock(9000 if early else 0)
            if early:
                result = self.tasks.again.delay()
            else:
                result = self.tasks.nap.options(retries=1, timeout=0.3).delay(9)
                self.turn_until(worker, lambda: self.lines("nap"), clock)
                clock = self.set_the_clock(9000)
            self.turn_until(worker, lambda: result.status == "retrying", clock)
            clock, began = self.set_the_clock(0), time.monotonic()
            self.turn_until(worker, result.ready, clock)
            self.assertLess(time.monotonic() - began, 8)
            self.assertEqual(result.attempt, 2)

    def test_a_task_behind_many_that_cannot_run_starts_in_a_few_turns(self):
        """No hint and no poll is waited for; and then the worker sleeps."""
        worker = self.started()
        self.turn_until(worker, lambda: worker.is_ready)
        self.fill(1000, "'q' || i", "'unknown'")
        # The round begins without it; the tick of a minute may be claimed before.
        self.turn_until(worker, lambda: not worker.lookout.round.is_over)
        worker.senses.ear.close()
        result = self.tasks.add.options(queue="a", priority=9).delay(1, 2)
        for _ in range(60):
            if not worker.pool.in_hand():
                self.assertEqual(worker.lookout.round.is_over or worker._patience(), 0)
                worker.step(pybgworker.now_ms())
        self.assertEqual(worker.pool.in_hand(), 1)
        self.turn_until(worker, result.ready)
        for _ in range(2 * 60):             # of each kind of places
            worker.step(pybgworker.now_ms())
        self.assertGreater(worker._patience(), 0)

    def test_a_new_worker_says_what_waits_for_its_rate(self):
        worker, said = self.started(), []
        name = self.tasks.limited.name
        self.sql("insert into bg_rate values (?, ?)", name, pybgworker.now_ms() + 9_000)
        self.tasks.limited.delay()
        worker.journal.say = lambda event, **about: said.append((event, about.get("name")))
        self.turn_until(worker, lambda: ("rate_limited", name) in said)

    def test_a_name_that_waits_for_its_rate_is_said_once_a_wait(self):
        journal, said = pybgworker.Journal(Log(-1), "w"), []
        journal.say = lambda event, **about: said.append((event, about["name"]))
        for limited, now, count in (
            ({"t": math.inf}, 900, 0), ({"t": 2000}, 1000, 1), ({"t": 2000}, 1500, 1), ({"t": 3000}, 1900, 1),
            ({"t": 4000}, 2100, 1), ({"t": 5000, "u": 5000}, 3500, 2), ({}, 5000, 2),
            ({"t": 9000}, 6000, 3),
        ):
            journal.limited(limited, now)
            with self.subTest(limited, now=now):
                self.assertEqual(len(said), count)
        self.assertEqual(said, [("rate_limited", name) for name in "tut"])

    def test_each_end_of_a_run_has_its_event(self):
        journal, run = pybgworker.Journal(Log(-1), "w"), Run(
            1, "t", "q", 0, 3, 0, 2.0, 0, None, "", 5)
        said = []
        journal.run = lambda event, run, **about: said.append((event, about))
        error = {"kind": "timeout", "message": "too long", "traceback": "in f"}
        for state, event in ((pybgworker.SUCCESS, "task_success"),
                             (pybgworker.FAILED, "task_failure"),
                             (pybgworker.RETRYING, "task_retry"),
                             (pybgworker.CANCELLED, "task_cancelled")):
            journal.outcome(Outcome(run, state, error=error, duration=0.5, run_at=1000))
            self.assertEqual((said[-1][0], said[-1][1]["duration"]), (event, 0.5))
        journal.death(pybgworker.Ended(run, "timeout", None, error, None, None, 2.5))
        self.assertEqual(said[4:], [("task_timeout", {
            "duration": 2.5, "timeout": 2.0, "stack": "in f"})])

    def test_a_line_names_its_run_however_many_there_have_been(self):
        log = Log(os.open(os.devnull, os.O_WRONLY))
        journal = pybgworker.Journal(log, "w")
        runs = [Run(n, f"t{n}", "q", n, 3, 0, 2.0, 0, None, "", 5) for n in range(5)]
        with mock.patch.object(pybgworker, "_MOST_RUNS", 2):
            for event in "task_start", "task_success":
                for run in runs:
                    journal.run(event, run)
                    journal.run("output", run)
                    self.assertLessEqual(len(journal._about), 2)
        said = [json.loads(line) for line in log._lines]
        self.assertEqual([(r["task_id"], r["name"], r["attempt"]) for r in said],
                         [(n, f"t{n}", n + 1) for n in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4)] * 2)

    def test_a_run_that_is_sent_to_another_child_has_started_once(self):
        journal = pybgworker.Journal(Log(-1), "w")
        run = Run(1, "t", "q", 0, 3, 0, 2.0, 0, None, "", 5)
        journal.run("task_start", run)
        journal.run("task_start", run)
        self.assertEqual(len(journal.log._lines), 1)

    def test_old_finished_tasks_are_deleted(self):
        worker = self.started(retention="1h", retention_failed="forever")
        good, bad = self.tasks.add.delay(1, 2), self.tasks.die.delay("exit")
        self.turn_until(worker, lambda: good.ready() and bad.ready())
        self.sql("update bg_task set finished_at = finished_at - 7200000")
        worker.house._prune(pybgworker.now_ms())

        self.assertRaises(pybgworker.TaskNotFound, good.ready)
        self.assertTrue(bad.failed())


# == Command line =============================================================


class CommandLine(Served):

    def test_a_thread_of_the_app_does_not_keep_a_worker_that_has_ended(self):
        """Exit handlers run all the same, and the status stays."""
        (self.folder / "threaded.py").write_text(textwrap.dedent("""
            import atexit, os, sys, threading, time
            from pybgworker import task
            if "SEEN" not in os.environ:            # the nursery
                os.environ["SEEN"] = "1"
                threading.Thread(target=time.sleep, args=(60,)).start()
                atexit.register(lambda: open("handled", "w").write("whole"))
                if os.environ.get("BROKEN"):
                    raise ValueError("broken")

            @task(name="t", retries=0)
            def t(): pass
            """))
        worker = self.worker("--concurrency", 1, app="threaded")
        worker.wait_for("worker_ready")
        began_at = time.monotonic()
        self.assertEqual(worker.stop(15), 0)
        self.assertLess(time.monotonic() - began_at, 10)
        self.assertEqual(self.lines("handled"), ["whole"])
        (self.folder / "handled").unlink()
        broken = self.worker("--concurrency", 1, app="threaded", BROKEN="1")
        self.assertEqual(broken.wait(15), 1)
        self.assertIn("ValueError: broken", "".join(broken.errors))
        self.assertEqual(self.lines("handled"), ["whole"])

    def test_a_program_that_calls_main_is_not_ended_by_it(self):
        self.app.send("t")
        done = self.python("""
            import threading
            from pybgworker import main
            go_on = threading.Event()
            threading.Thread(target=go_on.wait).start()
            status = main(["cron"])
            print(status, threading.active_count())
            go_on.set()
        """)
        self.assertEqual(done.stdout.split()[-2:], ["0", "2"])

    def ok(self, *argv, **kwargs):
        done = self.cli(*argv, **kwargs)
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        return done.stdout

    def refused(self, *argv, code=1, **kwargs):
        done = self.cli(*argv, **kwargs)
        self.assertEqual((done.returncode, done.stdout), (code, ""))
        self.assertNotIn("Traceback", done.stderr)
        return done.stderr

    def test_every_reading_command_prints_one_document_of_json(self):
        self.tasks.add.delay(1, 2)
        self.worker("--burst").wait()
        for command in ("inspect", "list", "failed", "stats", "cron", "show 1"):
            with self.subTest(command):
                json.loads(self.ok(*command.split(), "--json"))
                self.assertTrue(self.ok(*command.split()).strip())

    def test_list_is_an_array_that_can_be_narrowed(self):
        self.tasks.add.delay_many([(1, 2)] * 3)
        self.tasks.nap.options(queue="q").delay(1)
        self.store.cancel(2, self.now)
        for flags, ids in (((), [4, 3, 2, 1]), (("--status", "cancelled"), [2]),
                           (("--name", "tasks.nap"), [4]), (("--queue", "q"), [4]),
                           (("--limit", 2), [4, 3])):
            with self.subTest(flags):
                rows = json.loads(self.ok("list", "--json", *flags))
                self.assertEqual([row["id"] for row in rows], ids)

    def test_inspect_shows_workers_tasks_and_schedules(self):
        worker = self.worker("--worker-name", "w1", "--concurrency", 3)
        worker.wait_for("worker_ready")
        self.store.pause("slow", self.now)
        self.app.send("nobody.knows")
        report = json.loads(self.ok("inspect", "--json"))
        found, = report["workers"]
        self.assertEqual((found["name"], found["concurrency"], found["stale"]),
                         ("w1", 3, False))
        self.assertLess(found["heartbeat_age"], 6)
        self.assertEqual(report["paused_queues"], ["slow"])
        self.assertEqual(report["tasks"][0],
                         {"queue": "default", "name": "nobody.knows", "queued": 1})
        self.assertEqual(report["schedules"][0]["schedule"], "tasks.tick")

    def test_enqueue_takes_json_and_prints_the_id(self):
        self.worker()
        self.get(self.tasks.add.delay(1, 2))
        task_id = int(self.ok("enqueue", "tasks.add", "20", "22"))
        self.assertEqual(self.get(self.app.result(task_id)), 42)
        self.assertIn('\'"hello"\'', self.refused("enqueue", "t", "hello", code=2))
        self.assertIn("'b=\"x\"'", self.refused("enqueue", "t", "b=x", code=2))
        self.tasks.echo.delay()
        task_id = int(self.ok("enqueue", "tasks.echo", "b=2", '"a=1"', 'c={"d": "e=f"}'))
        self.assertEqual(self.get(self.app.result(task_id)),
                         [("a=1",), {"b": 2, "c": {"d": "e=f"}}])
        self.ok("enqueue", "t", "--queue", "q", "--key", "k", "--countdown", "60")
        row = json.loads(self.ok("list", "--json", "--queue", "q"))[0]
        self.assertEqual((row["key"], row["status"]), ("k", "scheduled"))

    def test_enqueue_without_an_app_goes_by_the_newest_of_the_name(self):
        self.assertIn("1 to 200 characters", self.refused("enqueue", "\udcff"))
        first = self.cli("enqueue", "mail")
        self.assertIn("it goes to the queue default, with the", first.stderr)
        self.app.send("mail", queue="slow", priority=2, retries=0, timeout=1.5)
        self.app.send("other", queue="fast")
        row = self.store.task(int(self.ok("enqueue", "mail", "--priority", "1")))
        self.assertEqual((row.queue, row.priority, row.retries, row.timeout),
                         ("slow", 1, 0, 1.5))
        row = self.store.task(int(self.ok("enqueue", "mail", "--queue", "new")))
        self.assertEqual((row.queue, row.retries), ("new", 0))

    def test_enqueue_with_an_app_refuses_what_that_has_not_and_names_what_is_near(self):
        message = self.refused("enqueue", "--app", "tasks", "tasks.ad", "1", "2")
        self.assertIn("--app tasks has no task 'tasks.ad'; it has tasks.add", message)
        message = self.refused("enqueue", "--app", "tasks", "xyz")
        self.assertRegex(message, r"it has tasks\.\w+(, tasks\.\w+){4}, …\n")
        self.assertFalse(self.db.exists())

    def test_enqueue_says_when_it_makes_a_database(self):
        for code in (1, 0):         # a second time there is nothing to say
            done = self.cli("enqueue", "--db", "typo.db", "t")
            self.assertEqual(code, done.stderr.count(
                f"made the database {self.folder.resolve() / 'typo.db'}\n"))
        self.assertIn("there is no database", self.refused("pause", "q", "--db", "x.db"))

    def test_an_app_is_a_module_and_not_a_file(self):
        (self.folder / "src").mkdir()
        for given, meant in (("tasks.py", "tasks"), ("./tasks.py:app", "tasks:app"),
                             ("src/mail/tasks.py", "src.mail.tasks"), ("no.py", "no")):
            for argv in (("run", "--app", given), ("enqueue", "t", "--app", given)):
                message = self.refused(*argv, code=2)
                self.assertIn(f"--app {given}: it is the name of a module, not of its "
                              f"file: --app {meant}\n", message)

    def test_enqueue_with_an_app_takes_the_tasks_own_options(self):
        self.store.create()
        task_id = int(self.ok("enqueue", "--app", "tasks", "tasks.nap", "1"))
        self.assertEqual(self.store.task(task_id).retries, 0)

    def test_retry_and_cancel_do_all_they_can_and_name_the_rest(self):
        self.tasks.add.delay_many([(1, 2)] * 2)
        self.assertEqual(self.ok("cancel", 1), "task 1 is cancelled\n")
        done = self.cli("cancel", 1, 2, 99, "abc")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stdout, "task 2 is cancelled\n")
        for words in ("task 1 is cancelled already", "no task 99 in", "no task 'abc'"):
            self.assertIn(words, done.stderr)
        self.assertEqual(self.ok("retry", 1), "task 1 is queued again\n")
        self.assertIn("task 1 is queued: only", self.refused("retry", 1))
        self.assertIn("nothing to retry", self.refused("retry", "--failed"))
        self.assertIn("nothing to retry: no task named 'nosuch' is failed",
                      self.refused("retry", "--failed", "--name", "nosuch"))

    def test_what_is_wrong_usage_is_status_two_and_what_is_not_there_is_one(self):
        self.store.create()
        for argv, words in ((("retry",), "retry takes the ids"),
                            (("retry", "1", "--failed"), "retry takes the ids"),
                            (("retry", "1", "--name", "a"), "--name goes with --failed"),
                            (("run", "--app", "tasks", "--limit", "0"), "unrecognized")):
            with self.subTest(argv):
                self.assertIn(words, self.refused(*argv, code=2))
        for argv in (("show", "abc"), ("show", "99"), ("retry", "abc"), ("cancel", "99")):
            with self.subTest(argv):
                self.assertRegex(self.refused(*argv), r"\Apybgworker: no task .*\n\Z")
        self.assertIn("PYBGWORKER_RETENTION='x': must be",
                      self.refused("prune", PYBGWORKER_RETENTION="x"))

    def test_retry_failed_takes_all_of_a_name(self):
        for name in ("a", "b", "a"):
            result = self.app.send(name)
            self.sql("update bg_task set state = 5, finished_at = 1 where id = ?", result.id)
        self.assertEqual(self.ok("retry", "--failed", "--name", "a"),
                         "2 tasks are queued again\n")

    def test_cancel_needs_no_worker_when_that_of_the_task_was_killed(self):
        worker = self.worker("--concurrency", 2)
        task, other = self.tasks.long_nap.delay(30), self.tasks.long_nap.delay(30)
        self.wait_lines("nap", 2)
        worker.kill()
        done = self.cli("cancel", task.id)
        self.assertEqual((done.returncode, done.stdout),
                         (0, f"task {task.id} is cancelled\n"))
        self.assertEqual(other.status, "queued")

    def test_cancel_waits_for_the_end_of_a_running_task(self):
        self.worker("--concurrency", 1)
        result = self.tasks.nap.delay(30)
        self.wait_lines("nap")
        self.assertIn("is running: only", self.refused("retry", result.id))
        self.assertEqual(self.ok("cancel", result.id), f"task {result.id} is cancelled\n")

    def test_forever_and_a_rate_go_from_the_flag_to_the_worker(self):
        args = pybgworker._parser().parse_args(
            ["run", "--app", "x", "--retention", "forever", "--rate-limit", "100/m",
             "--retention-failed", "1d", "--timeout", "0.30000000000000004"])
        app = App(retention="1h", timeout=5)
        app.override(**{s.name: getattr(args, s.name)
                        for s in pybgworker.SETTINGS if s.flag})
        found = app.settings
        self.assertEqual((found.retention, found.retention_failed, found.rate_limit,
                          found.timeout), (float("inf"), 86400, 100 / 60, 0.1 + 0.2))

    def test_what_is_kept_forever_is_not_pruned(self):
        self.app.send("t").cancel()
        self.sql("update bg_task set finished_at = 1")
        for keep, left in (("forever", 1), ("1d", 0)):
            self.ok("prune", "--yes", PYBGWORKER_RETENTION=keep)
            self.assertEqual(len(self.store.tasks()), left)

    def test_purge_and_prune_act_without_a_terminal_and_count(self):
        self.tasks.add.delay_many([(1, 2)] * 3)
        self.assertEqual(self.ok("purge", "--name", "tasks.add"), "3 tasks cancelled\n")
        self.assertEqual(self.ok("prune"), "0 tasks deleted\n")
        time.sleep(0.01)
        self.assertEqual(self.ok("prune", "--older-than", "0"), "3 tasks deleted\n")

    def test_purge_asks_on_a_terminal(self):
        pty = pybgworker.importlib.import_module("pty")
        self.tasks.add.delay(1, 2)
        for answer, code, status in ((b"n\n", 1, "queued"), (b"y\n", 0, "cancelled")):
            terminal, other = pty.openpty()
            os.write(terminal, answer)
            done = self.cli("purge", stdin=other)
            self.assertEqual(done.returncode, code)
            self.assertEqual(self.app.result(1).status, status)
            os.close(terminal)
            os.close(other)

    def test_prune_asks_with_what_it_would_do(self):
        pty = pybgworker.importlib.import_module("pty")
        for state in (4, 6, 5, 4):
            self.sql("update bg_task set state = ?, finished_at = 1 where id = ?", state,
                     self.app.send("t").id)
        self.sql("update bg_task set finished_at = ? where id = 4", int(time.time() * 1000))
        when = r"before \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
        for flags, forever, words in (
                ((), "30d", rf"Delete 3 tasks \(success, cancelled: {when}; failed: {when}\)"),
                ((), "forever", rf"Delete 2 tasks \(success, cancelled: {when}; failed: none"),
                (("--older-than", "1d"), "forever", r"Delete 3 tasks ")):
            terminal, other = pty.openpty()
            os.write(terminal, b"n\n")
            done = self.cli("prune", *flags, stdin=other, PYBGWORKER_RETENTION_FAILED=forever)
            os.close(terminal)
            os.close(other)
            with self.subTest(flags):
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stdout, words)
        self.assertEqual(self.ok("prune"), "3 tasks deleted\n")

    def test_pause_and_resume(self):
        self.store.create()
        self.ok("pause", "mail")
        self.assertEqual(self.store.paused_queues(), ["mail"])
        self.ok("resume", "mail")
        self.assertIn("mail is not paused", self.refused("resume", "mail"))

    def test_a_database_that_is_not_there_is_not_made_by_reading(self):
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        self.assertIn("there is no database", self.refused("inspect"))
        self.assertEqual(list(self.folder.iterdir()), [])
        (self.folder / "x").write_text("garbage " * 1000)
        self.assertIn("not a database", self.refused("list", "--db", "x"))

    def test_an_app_that_does_not_import_shows_the_users_traceback(self):
        (self.folder / "bad.py").write_text("import os\nraise ValueError('my fault')\n")
        done = self.cli("run", "--app", "bad")
        self.assertEqual(done.returncode, 1)
        self.assertIn("bad.py\", line 2", done.stderr)
        self.assertIn("ValueError: my fault", done.stderr)
        self.assertNotIn("pybgworker.py\"", done.stderr)
        self.assertIn("No module named 'nosuch'", self.refused("run", "--app", "nosuch"))

    def test_an_app_without_tasks_and_one_with_two_of_a_name(self):
        (self.folder / "empty.py").write_text("")
        self.assertIn("decorate a function with @task", self.refused("run", "--app", "empty"))
        (self.folder / "twice.py").write_text(
            "from pybgworker import task\n@task(name='a')\ndef f(): pass\n"
            "@task(name='a')\ndef g(): pass\n")
        self.assertIn("two tasks are named 'a'", self.refused("run", "--app", "twice"))

    def test_bad_settings_name_the_variable_and_bad_flags_the_flag(self):
        message = self.refused("run", "--app", "tasks", PYBGWORKER_CONCURRENCY="many")
        self.assertIn("PYBGWORKER_CONCURRENCY='many': must be a whole number", message)
        message = self.refused("run", "--app", "tasks", "--concurrency", "0", code=2)
        self.assertIn("--concurrency", message)

    def test_a_flag_beats_the_environment(self):
        worker = self.worker("--concurrency", 1, PYBGWORKER_CONCURRENCY="3")
        self.assertEqual(worker.wait_for("worker_start")["concurrency"], 1)

    def test_random_arguments_never_end_in_a_traceback(self):
        chance = random.Random(4)
        words = [c.name for c in pybgworker.COMMANDS if c.name not in ("run", "bench")]
        more = ["--json", "--limit", "-1", "99", "\ud800", "", "--db", "{}", "--name",
                "%s", "' or 1", "--yes", "--failed", "9" * 40, "--status", "queued"]
        main, out = pybgworker.main, open(os.devnull, "w", errors="replace")
        self.addCleanup(out.close)
        self.addCleanup(pybgworker.default_app._flags.clear)
        for _ in range(300):
            argv = [chance.choice(words)] + chance.choices(more, k=chance.randrange(4))
            os.chdir(self.folder)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                try:
                    code = main(argv)
                except SystemExit as exc:
                    code = exc.code
            self.assertIn(code, (0, 1, 2), argv)

    def test_rows_edited_by_hand_are_refused_or_survived(self):
        """By the commands, and by a worker, which goes on with the others."""
        for column, value in (("run_at", 10**17), ("created_at", "soon"), ("state", "x"),
                              ("priority", "x"), ("started_at", -10**15), ("attempt", "1x"), ("attempt", 1.5),
                              ("tick", "never"), ("name", b"\xff"), ("timeout", "long")):
            self.tasks.add.delay(1, 2)
            with self.subTest(column), self.assertRaises(sqlite3.IntegrityError):
                self.sql(f"update bg_task set {column} = ?", value)
        self.sql("delete from bg_task")
        odd = (("args", "{"), ("args", "[1]"), ("args", "5"), ("args", '{"$set": 5}'),
               ("args", '[[{"$decimal": "x"}], {}]'), ("args", b"\xff"), ("state", 77),
               ("timeout", 1e-9), ("retries", 10**12), ("key", b"\xff"),
               ("name", "nobody"), ("queue", ""), ("cancel_asked", "yes"), ("worker", "x"))
        ids = [self.tasks.add.delay(1, 2).id for _ in odd]
        for task_id, (column, value) in zip(ids, odd):
            self.sql(f"update bg_task set {column} = ? where id = ?", value, task_id)
        self.sql("insert into bg_payload values (?, ?)", ids[0] * 8 + 2, "[7]")
        worker = self.worker("--concurrency", 1)
        self.assertEqual(self.get(self.tasks.add.delay(1, 2)), 3)
        commands = [f"show {n}" for n in ids] + [
            f"{verb} {' '.join(map(str, ids))}" for verb in ("cancel", "retry")]
        for command in [*commands, f"show --json {ids[10]}", "list", "failed", "stats",
                        "inspect"]:
            done = self.cli(*command.split())
            with self.subTest(command):
                self.assertIn(done.returncode, (0, 1), done.stderr)
                self.assertNotIn("Traceback", done.stderr)
        self.assertEqual(self.get(self.tasks.add.delay(3, 4)), 7)
        self.assertEqual((worker.stop(), worker.errors), (0, []))

    def test_flags_say_what_is_allowed(self):
        for argv, words in (
            (("list", "--limit", "many"), "a whole number from 1 up"),
            (("prune", "--older-than", "soon"), "a number with s, m, h, d or w"),
            (("enqueue", "t", "--priority", "high"), "a whole number"),
            (("enqueue", "t", "--countdown", "later"), "a number with s, m, h, d or w"),
            (("run", "--app", "t", "--max-memory", "big"), "a number with k, m or g"),
            (("run", "--app", "t", "--max-memory", "512"), "at least 1m: bytes, or a"),
        ):
            with self.subTest(argv):
                message = self.refused(*argv, code=2)
                self.assertIn(f"argument {argv[-2]}: {argv[-1]!r}: must be", message)
                self.assertIn(words, message)

    def test_a_narrow_terminal_still_gets_its_listing(self):
        self.app.send("t\u2026", "\ud800")
        for extra in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"},
                      {"PYTHONIOENCODING": "latin-1:strict"}):
            with self.subTest(extra):
                self.assertIn("t\\u2026", self.ok("list", **extra))
                self.ok("show", "1", **extra)

    def shell(self, command, **kwargs):
        """Run a command line of sh in which $P is `python pybgworker.py`."""
        return subprocess.run(
            command.replace("$P", f"{sys.executable} {HERE / 'pybgworker.py'}"),
            shell=True, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, timeout=60, env=clean_environment(PYBGWORKER_DB=str(self.db)),
            **kwargs)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_output_that_cannot_be_written_is_one_line(self):
        self.tasks.add.delay(1, 2)
        for command, words in (("$P list >/dev/full", "No space left"),
                               ("$P list >&-", "standard output is closed"),
                               ("$P list --json </dev/null >&-", "closed")):
            with self.subTest(command):
                done = self.shell(command)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, rf"\Apybgworker: [^\n]*{words}[^\n]*\n\Z")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_worker_works_without_standard_streams(self):
        for streams in (">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"):
            result = self.tasks.add.delay(20, 22)
            with self.subTest(streams):
                done = self.shell(f"$P run --app tasks --burst {streams}")
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(result.result, 42)

    def test_a_folder_that_was_deleted_is_one_line(self):
        done = self.shell("mkdir gone && cd gone && rmdir ../gone && $P list")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Apybgworker: [^\n]*folder was deleted[^\n]*\n\Z")

    def test_json_too_deep_is_one_line(self):
        message = self.refused("enqueue", "t", "[" * 60_000, code=2)
        self.assertIn("is not JSON", message)

    def test_the_end_of_input_is_a_no(self):
        pty = pybgworker.importlib.import_module("pty")
        self.tasks.add.delay(1, 2)
        terminal, other = pty.openpty()
        os.write(terminal, b"\x04")             # Ctrl-D
        done = self.cli("purge", stdin=other)
        os.close(terminal)
        os.close(other)
        self.assertEqual((done.returncode, self.app.result(1).status), (1, "queued"))
        self.assertIn("nothing was changed", done.stderr)

    def test_inspect_counts_what_runs_now(self):
        worker = self.worker("--heartbeat-interval", 10, "--worker-timeout", 60)
        worker.wait_for("worker_ready")
        self.tasks.nap.delay(30)
        self.wait_lines("nap")
        found, = json.loads(self.ok("inspect", "--json"))["workers"]
        self.assertEqual(found["running"], 1)

    def test_inspect_knows_at_once_that_a_worker_was_killed(self):
        worker = self.worker("--worker-name", "w1")
        worker.wait_for("worker_ready")
        found, = json.loads(self.ok("inspect", "--json"))["workers"]
        self.assertEqual((found["dead"], found["stale"]), (False, False))
        worker.kill()
        found, = json.loads(self.ok("inspect", "--json"))["workers"]
        self.assertEqual((found["dead"], found["stale"]), (True, False))
        self.assertRegex(self.ok("inspect"), r"(?m)^w1 .* ago DEAD$")
        os.unlink(f"{self.db}-live")            # then nobody can know
        found, = json.loads(self.ok("inspect", "--json"))["workers"]
        self.assertFalse(found["dead"])
        self.assertFalse(os.path.exists(f"{self.db}-live"))

    def test_the_log_is_text_on_a_terminal(self):
        pty = pybgworker.importlib.import_module("pty")
        for flags, shown in (((), b"Z worker_start "),
                             (("--log-format", "json"), b'"event":"worker_start"')):
            terminal, other = pty.openpty()
            subprocess.run(
                [sys.executable, str(HERE / "pybgworker.py"), "run", "--app", "tasks",
                 "--burst", *flags], stdout=other, cwd=self.folder, check=True,
                env=clean_environment(PYBGWORKER_DB=str(self.db)))
            os.close(other)
            self.assertIn(shown, os.read(terminal, 1 << 16))
            os.close(terminal)

    def interrupted(self, module, argv):
        """Exit status and errors when Ctrl-C comes as this module is imported."""
        shutil.copy(HERE / "pybgworker.py", self.folder)
        path = self.folder / f"{module}.py"
        path.write_text("import os, signal\n"
                        "open('begun', 'a').write('x')\n"
                        f"if os.path.getsize('begun') >= {1 + (module[:4] == 'site')}:\n"
                        "    os.kill(os.getpid(), signal.SIGINT)\n")
        done = subprocess.run(
            [sys.executable, *argv], cwd=self.folder, stderr=subprocess.PIPE, text=True,
            env=clean_environment(PYTHONPATH=str(self.folder)), timeout=60,
            stdout=subprocess.DEVNULL,      # a shell may have us ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        path.unlink()
        (self.folder / "begun").unlink()
        return done.returncode, done.stderr

    def test_ctrl_c_is_quiet_however_early_it_comes(self):
        """While this file is read, while it starts again, and while it parses."""
        ended = -signal.SIGINT, ""              # a shell says 130
        stopped = 0, "pybgworker: stopped before it began\n"
        for module, argv, expected in (
            ("sqlite3", ["pybgworker.py", "list"], ended),
            ("sqlite3", ["-m", "pybgworker", "run", "--app", "tasks"], ended),
            ("argparse", ["pybgworker.py", "list"], (130, "")),
            ("argparse", ["pybgworker.py", "run", "--app", "tasks"], (130, "")),
            ("sitecustomize", ["pybgworker.py", "run", "--app", "tasks"], stopped),
        ):
            with self.subTest(f"{module} {argv}"):
                self.assertEqual(self.interrupted(module, argv), expected)

    def test_more_children_than_there_can_be_are_refused(self):
        for argv in (("run", "--app", "tasks"), ("bench",)):
            message = self.refused(*argv, "--concurrency", "9999", code=2)
            self.assertIn("'9999': must be a whole number from 1 to 1,000", message)
        message = self.refused("run", "--app", "tasks", PYBGWORKER_CONCURRENCY="1001")
        self.assertIn("PYBGWORKER_CONCURRENCY='1001': must be a whole", message)
        done = self.shell("ulimit -n 128; $P run --app tasks --concurrency 12")
        self.assertEqual(done.returncode, 1)
        self.assertRegex(done.stderr, r"\Apybgworker: concurrency=12: needs 155 descrip"
                         r"tors, and this process may have 128, which is enough for 8: "
                         r"see [^\n]*\n\Z")
        self.tasks.my_pid.delay()
        done = self.shell("ulimit -S -n 100; $P run --app tasks --concurrency 12 --burst")
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_usage_is_status_two(self):
        for argv in ((), ("nonsense",), ("show",), ("list", "--status", "odd")):
            self.assertIn("usage:", self.refused(*argv, code=2))
        self.assertRegex(self.refused("enqueue", code=2), r"are required: NAME\n")

    def test_help_says_the_default_of_every_option(self):
        for setting in pybgworker.SETTINGS:
            self.assertRegex(setting.meaning, r"\(default: .*\)$")
            shown = re.search(r"\(default: (.*)\)$", setting.meaning)[1]
            if setting.default is not None and not isinstance(setting.default, bool):
                self.assertEqual(setting.parse(shown), setting.default)
        for command in pybgworker.COMMANDS:
            for names, options in command.flags:
                if names[0].startswith("-") and "action" not in options \
                        and not options.get("required"):
                    self.assertIn("(default: ", options["help"], command.name)

    def test_help_has_every_command_with_an_example(self):
        text = self.ok("--help")
        for command in pybgworker.COMMANDS:
            self.assertIn(command.help, re.sub(r"\s+", " ", text))
            self.assertIn(f"pybgworker.py {command.example}", text)
            pybgworker._parser().parse_args(command.example.split())
            self.assertIn(command.example, self.ok(command.name, "--help"))

    def test_colour_is_for_terminals_without_no_color(self):
        pty = pybgworker.importlib.import_module("pty")
        self.tasks.add.delay(1, 2)
        self.store.cancel(1, self.now)
        for extra, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
            terminal, other = pty.openpty()
            subprocess.run([sys.executable, str(HERE / "pybgworker.py"), "list"],
                           stdout=other, env=clean_environment(
                               PYBGWORKER_DB=str(self.db), **extra), check=True)
            os.close(other)
            self.assertEqual(b"\033[" in os.read(terminal, 4096), coloured)
            os.close(terminal)
        self.assertNotIn("\033", self.ok("list"))

    def test_text_logs_are_for_eyes(self):
        self.tasks.add.delay(1, 2)
        text = self.ok("run", "--app", "tasks", "--burst", "--log-format", "text")
        self.assertRegex(text, r"(?m)^\S+Z task_success +task_id=1 name=\"tasks.add\"")

    def test_a_reader_that_stops_reading_is_no_error(self):
        self.tasks.add.delay_many([(1, 2)] * 3000)
        command = f"{sys.executable} {HERE / 'pybgworker.py'} list --limit 3000 | head -1"
        done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True,
                              stdout=subprocess.PIPE,
                              env=clean_environment(PYBGWORKER_DB=str(self.db)))
        self.assertEqual(done.stderr, "")


# == Cron =====================================================================


def matches(expr, moment):
    """The day rule and the sets, said in another way: an oracle for UTC."""
    cron = Cron(expr)
    minute, hour, dom, _, dow = expr.split()
    weekday = moment.isoweekday() % 7
    days = (moment.day in cron._wall.days, weekday in cron._wall.weekdays)
    day = all(days) if dom[0] == "*" or dow[0] == "*" else any(days)
    return (day and moment.month in cron._wall.months and moment.hour in cron._wall.hours
            and moment.minute in cron._wall.minutes)


class Crons(unittest.TestCase):

    VALUES = """
        field           text            values
        minute          */15            0,15,30,45
        minute          5-20/5          5,10,15,20
        minute          5/20            5,25,45
        minute          59/15           59
        minute          */100           0
        minute          1-5/60          1
        minute          007,08          7,8
        minute          3,1,2,2         1,2,3
        hour            */24            0
        hour            22-23,0-2       0,1,2,22,23
        day-of-month    31              31
        month           JAN,3,May-jul   1,3,5,6,7
        month           12/3            12
        day-of-week     */7             0
        day-of-week     */5             0,5
        day-of-week     0-7/3           0,3,6
        day-of-week     1-7/2           0,1,3,5
        day-of-week     7               0
        day-of-week     1-fri           1,2,3,4,5
        day-of-week     fri-sun         0,5,6
        day-of-week     sat-SUN         0,6
        day-of-week     5/1             5,6
    """
    BAD = """
        field         token     expression          says
        minute        60        60 * * * *          '60' is not in 0-59
        hour          24        * 24 * * *          '24' is not in 0-23
        day-of-month  0         * * 0 * *           '0' is not in 1-31
        month         13        * * * 13 *          '13' is not in 1-12
        day-of-week   8         * * * * 8           '8' is not in 0-7
        minute        64        5-64/30 * * * *     '64' is not in 0-59
        hour          22-2      * 22-2 * * *        use 22-23,0-2
        day-of-week   monday    * * * * monday      use mon or 1
        month         sept      * * * sept *        use sep or 9
        minute        mon       mon * * * *         'mon' is not in 0-59
        minute        ?         ? * * * *           use * instead of ?
        day-of-month  L         * * L * *           last day, is not supported
        day-of-month  15W       * * 15W * *         W (the nearest weekday)
        day-of-week   1#2       * * * * 1#2         the n-th weekday
        minute        0~5       0~5 * * * *         see jitter=
        minute        H         H * * * *           see jitter=
        minute        *5        *5 * * * *          '*5'
        minute        **        ** * * * *          '**'
        minute        *-5       *-5 * * * *         '*-5'
        minute        */        */ * * * *          '*/'
        minute        0         */0 * * * *         step '0'
        minute        */-1      */-1 * * * *        '*/-1'
        minute        */5/5     */5/5 * * * *       '*/5/5'
        minute        1_0       1_0 * * * *         '1_0'
        minute        +5        +5 * * * *          '+5'
        minute        ٣         ٣ * * * *           '٣'
        minute        ¹         ¹ * * * *           '¹'
        macro         @reboot   @reboot             when your program starts
        macro         @every    @every              is not one of
        fields        -         * * * *             5 fields expected, 4 found
        fields        -         0 * * * * *         seconds and years are not supported
    """

    def utc(self, *when):
        return dt.datetime(*when, tzinfo=dt.timezone.utc)

    def rows(self, table):
        return [re.split(r"  +", line.strip()) for line in table.strip().splitlines()[1:]]

    def test_what_a_field_means(self):
        order = ["minute", "hour", "day-of-month", "month", "day-of-week"]
        for field, text, values in self.rows(self.VALUES):
            parts = ["*"] * 5
            parts[order.index(field)] = text
            cron = Cron(" ".join(parts))
            found = [cron._wall.minutes, cron._wall.hours, cron._wall.days, cron._wall.months,
                     cron._wall.weekdays][order.index(field)]
            with self.subTest(f"{field} {text}"):
                self.assertEqual(sorted(found), [int(v) for v in values.split(",")])

    def test_what_is_refused_and_how(self):
        for field, token, expr, says in self.rows(self.BAD):
            with self.subTest(expr), self.assertRaises(CronError) as caught:
                Cron(expr)
            error = caught.exception
            self.assertEqual((error.expr, error.field), (expr, field))
            self.assertIn(says, str(error))
            if token != "-":
                self.assertEqual(error.token, token)

    def test_the_whole_message(self):
        with self.assertRaises(ValueError) as caught:
            Cron("60 * * * *")
        self.assertEqual(str(caught.exception),
                         "bad cron '60 * * * *': minute: '60' is not in 0-59")

    def test_more_that_is_refused(self):
        for expr in ("", " ", "1, * * * *", ",1 * * * *", "1,,2 * * * *", "*\v* * * *",
                     "* * * *\u3000*", "9" * 5000 + " * * * *", "0-59," * 400 + "1 * * * *",
                     "* * * * *\n", "1.5 * * * *", "5-*/2 * * * *", "*/mon * * * *"):
            with self.subTest(expr[:30]):
                self.assertRaises(CronError, Cron, expr)
        for expr in (None, 5, b"* * * * *", ["*"] * 5):
            self.assertRaises(TypeError, Cron, expr)

    def test_macros_and_white_space(self):
        after = self.utc(2026, 5, 17, 10, 30)
        for macro, expected in (
            ("@yearly", (2027, 1, 1)), ("@Annually", (2027, 1, 1)), ("@monthly", (2026, 6, 1)),
            ("@weekly", (2026, 5, 24)), ("@DAILY", (2026, 5, 18)),
            ("@midnight", (2026, 5, 18)), ("@hourly", (2026, 5, 17, 11)),
        ):
            self.assertEqual(Cron(f" {macro}\t").next(after), self.utc(*expected))
        self.assertEqual(Cron("\t5  4\t* * * ").next(after), self.utc(2026, 5, 18, 4, 5))

    def test_the_day_rule_looks_at_the_first_character_only(self):
        for expr, days in (
            ("0 0 */2 * 1", [11, 25]),              # odd Mondays
            ("0 0 13 * 5", [1, 8, 13, 15, 22, 29]),
            ("0 0 1-31 * 1", list(range(1, 32))),
            ("0 0 1 * 0-6", list(range(1, 32))),
            ("0 0 *,1 * 1", [4, 11, 18, 25]),
            ("0 0 1,* * 1", list(range(1, 32))),
            ("0 9 */100,1-7 * 1", [4]),             # the first Monday
        ):
            found, at = [], self.utc(2026, 4, 30, 23, 59)
            while (at := Cron(expr).next(at)).month == 5:
                found.append(at.day)
            with self.subTest(expr):
                self.assertEqual(found, days)

    def test_next_is_strictly_after_and_prev_strictly_before(self):
        cron, noon = Cron("* * * * *"), self.utc(2026, 1, 1, 12)
        us = dt.timedelta(microseconds=1)
        minute = dt.timedelta(minutes=1)
        self.assertEqual(cron.next(noon), noon + minute)
        self.assertEqual(cron.next(noon + us), noon + minute)
        self.assertEqual(cron.next(noon - us), noon)
        self.assertEqual(cron.prev(noon), noon - minute)
        self.assertEqual(cron.prev(noon + us), noon)
        self.assertRaises(ValueError, cron.next, dt.datetime(2026, 1, 1))

    def test_never_is_decided(self):
        for expr, never in (
            ("0 0 30 2 *", True), ("0 0 31 4,6,9,11 *", True), ("0 0 30 2 */7", True),
            ("0 0 30 2 1", False), ("0 0 29 2 *", False), ("0 0 31 2,3 *", False),
        ):
            self.assertEqual(Cron(expr).never, never, expr)
            self.assertEqual(Cron(expr).next(self.utc(2026, 1, 1)) is None, never, expr)

    def test_leap_years_and_the_end_of_time(self):
        feb29 = Cron("0 0 29 2 *")
        self.assertEqual(feb29.next(self.utc(2096, 3, 1)), self.utc(2104, 2, 29))
        self.assertEqual(Cron("0 0 29 2 */7").next(self.utc(2088, 3, 1)),
                         self.utc(2128, 2, 29))
        self.assertIsNone(feb29.next(self.utc(9997, 1, 1)))
        self.assertIsNone(feb29.prev(self.utc(3, 1, 1)))

    def test_random_expressions_are_refused_clearly_or_have_ticks(self):
        chance = random.Random(12)
        words = ["*", "/", "-", ",", "?", "L", "W", "#", "H", "~", "@daily", "@", "mon",
                 "jan", "sun", "0", "7", "60", "99999999999", "\u0663", "\u00b2", "\n",
                 " ", "  ", "\t", "\0", "\ud800", "-1", "1e3", "0x1", "5", "*/5", "1-5"]
        good = 0
        at = self.utc(2026, 3, 1)
        for n in range(6000):
            parts = chance.choices(words, k=chance.randrange(1, 8))
            if n % 2:           # five fields, nearly right
                parts = [chance.choice(("*", "*/2", "1", "5", "0-3", chance.choice(words)))
                         for _ in range(5)]
            expr = chance.choice((" ", " ", "")).join(parts)
            try:
                cron = Cron(expr, chance.choice(("UTC", "Europe/Paris")))
            except CronError as exc:
                self.assertEqual(exc.expr, expr)
                self.assertTrue(exc.field and str(exc).startswith("bad cron"), expr)
                continue
            good += 1
            tick = cron.next(at)
            self.assertEqual(tick is None, cron.never, expr)
            if tick is not None:
                self.assertTrue(at < tick, expr)
                self.assertEqual(cron.next(tick - dt.timedelta(seconds=1)), tick, expr)
        self.assertGreater(good, 300)

    def test_a_minute_by_minute_look_agrees(self):
        chance = random.Random(11)
        choices = (["*", "*/7", "5,50", "10-12"], ["*", "3", "*/6", "22-23"],
                   ["*", "*/9", "13", "28-31"], ["*", "2", "*/5"], ["*", "1", "5-7", "*/3"])
        for _ in range(40):
            expr = " ".join(chance.choice(c) for c in choices)
            cron = Cron(expr)
            at = self.utc(2026, chance.randrange(1, 13), 25, chance.randrange(24))
            for _ in range(3000):
                at += dt.timedelta(minutes=1)
                before = cron.prev(at + dt.timedelta(minutes=1))
                if (before == at) != matches(expr, at):
                    self.fail(f"{expr} at {at}: {before}")

    ZONES = """
        expression       zone                 after             ticks
        30 2 * * *       Europe/Paris         2024-03-30T12:00  03-31T03:00+02:00 04-01T02:30+02:00
        30 2 * * *       Europe/Paris         2024-10-26T12:00  10-27T02:30+02:00 10-28T02:30+01:00
        0,30 2 * * *     Europe/Paris         2024-03-30T12:00  03-31T03:00+02:00 04-01T02:00+02:00
        */30 2 * * *     Europe/Paris         2024-03-30T12:00  04-01T02:00+02:00 04-01T02:30+02:00
        */30 2 * * *     Europe/Paris         2024-10-26T12:00  10-27T02:00+02:00 10-27T02:30+02:00 10-27T02:00+01:00 10-27T02:30+01:00
        0 * * * *        Europe/Paris         2024-10-27T01:30  10-27T02:00+02:00 10-27T02:00+01:00 10-27T03:00+01:00
        0 */2 * * *      Europe/Paris         2024-03-30T23:30  03-31T00:00+01:00 03-31T04:00+02:00
        0 0 * * *        America/Sao_Paulo    2018-11-03T12:00  11-04T01:00-02:00 11-05T00:00-02:00
        15 2 * * *       Australia/Lord_Howe  2024-10-05T12:00  10-06T02:30+11:00 10-07T02:15+11:00
        30 * * * 0       Australia/Lord_Howe  2024-04-07T01:00  04-07T01:30+11:00 04-07T01:30+10:30 04-07T02:30+10:30
        30 1 * * *       Antarctica/Troll     2024-03-30T12:00  03-31T03:00+02:00 04-01T01:30+02:00
        30 9 * * *       Pacific/Apia         2011-12-29T08:00  12-29T09:30-10:00 12-31T09:30+14:00
    """

    def test_clock_changes_as_in_debian(self):
        for expr, zone, after, ticks in self.rows(self.ZONES):
            cron = Cron(expr, zone)
            at = dt.datetime.fromisoformat(after).replace(tzinfo=cron._zone)
            for tick in ticks.split():
                at = cron.next(at)
                with self.subTest(f"{expr} {zone} {tick}"):
                    self.assertEqual(at.isoformat(timespec="minutes")[5:], tick)

    def test_the_days_of_a_clock_change_have_46_and_50_half_hours(self):
        cron = Cron("*/30 * * * *", "Europe/Paris")
        for day, count in (((2024, 3, 31), 46), ((2024, 10, 27), 50)):
            start = dt.datetime(*day, tzinfo=cron._zone).timestamp()
            end = (dt.datetime(*day) + dt.timedelta(days=1)).replace(
                tzinfo=cron._zone).timestamp()
            found, tick = 0, cron.tick_after(start - 1)
            while tick < end:
                found, tick = found + 1, cron.tick_after(tick)
            self.assertEqual(found, count)

    def test_prev_visits_what_next_visits(self):
        zones = ("UTC", "Europe/Paris", "America/Sao_Paulo", "Australia/Lord_Howe",
                 "Africa/Casablanca", "Pacific/Apia", "Asia/Pyongyang")
        exprs = ("*/30 2 * * *", "30 2 * * *", "15,45 0-3 * * *", "* 1-2 * * *",
                 "0-59/7 0-3 * * 0", "*/30 1 27 10 *", "*/20 */3 */9 * *")
        for zone in zones:
            for expr in exprs:
                cron = Cron(expr, zone)
                for start in (1_711_750_000, 1_729_900_000, 1_325_100_000, 1_540_900_000):
                    there, back = [], []
                    tick = start
                    for _ in range(40):
                        tick = cron.tick_after(tick)
                        there.append(tick)
                    tick += 1
                    for _ in range(40):
                        tick = cron.tick_before(tick)
                        back.append(tick)
                    self.assertEqual(there, back[::-1], f"{expr} {zone} {start}")

    def test_an_unknown_zone_is_named(self):
        for zone in ("Mars/Base", "", "../../etc/passwd", None, 5):
            with self.subTest(zone), self.assertRaises(CronError) as caught:
                Cron("* * * * *", zone)
            self.assertEqual(caught.exception.field, "tz")

    PLANS = """
        misfire  seconds late  ticks  missed
        latest   0             1      0
        latest   13            1      0
        skip     13            1      0
        all      13            1      0
        latest   3600          1      12
        skip     3645          0      13
        all      3600          13     0
        latest   31536000      1      1000
        all      31536000      1000   1000
    """

    def test_what_is_done_about_ticks_that_are_late(self):
        cron, tick = Cron("*/5 * * * *"), 1_700_000_100
        for misfire, late, ticks, missed in self.rows(self.PLANS):
            done = [[tick - 300, tick - 300]]
            plan = pybgworker.plan_ticks(cron, done, tick + int(late), misfire)
            with self.subTest(f"{misfire} {late}"):
                self.assertEqual((len(plan.ticks), plan.missed), (int(ticks), int(missed)))
                self.assertEqual(plan.ticks, sorted(plan.ticks))
                self.assertEqual(plan.next_tick, cron.tick_after(tick + int(late)))

    LEAPING = """
        */5 * * * *     UTC
        30 2 * * *      Europe/Paris
        */20 2,3 * * *  Europe/Paris
        15 * * * *      Australia/Lord_Howe
        0 9 * * mon     America/New_York
        0 */6 * * *     Asia/Kolkata
    """

    def test_no_tick_twice_and_none_lost_however_the_clock_leaps(self):
        """A tick is not *lost* if a look at that very time has dealt with it before."""
        chance = random.Random(7)
        self.addCleanup(setattr, pybgworker, "_MISFIRE_CAP", pybgworker._MISFIRE_CAP)
        pybgworker._MISFIRE_CAP = 30
        schedules = [line.rsplit(None, 1) for line in self.LEAPING.strip().splitlines()]
        for round_ in range(60):
            cron = Cron(*chance.choice(schedules))
            misfire = chance.choice(("latest", "skip", "all"))
            now = 1_790_000_000 + chance.randrange(10**7)       # clocks change soon
            done = pybgworker.plan_ticks(cron, [], now).done
            off, ran, seen = 0, [], {cron.tick_before(now + 1)}
            for _ in range(40):
                if chance.random() < 0.1:
                    off = chance.choice((0, 0, 3600, 400 * 86400, -3 * 3600, -(10**9)))
                    leapt = True
                else:
                    leapt = False
                    now = chance.choice((now + 1, cron.tick_after(now + off) - off))
                plan = pybgworker.plan_ticks(cron, done, now + off, misfire)
                latest = cron.tick_before(now + off + 1)
                with self.subTest(f"{round_} {cron} {misfire} {now} {off:+}"):
                    self.assertFalse(set(plan.ticks) & set(ran))
                    self.assertEqual(sorted(sum(plan.done, [])), sum(plan.done, []))
                    if latest == now + off and not leapt and len(plan.done) < 8:
                        self.assertTrue(latest in plan.ticks or latest in {*ran, *seen})
                ran, done = ran + plan.ticks, plan.done
                seen.add(latest)

    def test_jitter_is_the_same_for_a_name(self):
        offsets = {pybgworker.jitter_offset(f"task {n}", 60) for n in range(50)}
        self.assertEqual(pybgworker.jitter_offset("a", 60), pybgworker.jitter_offset("a", 60))
        self.assertGreater(len(offsets), 40)
        self.assertTrue(all(0 <= offset < 60 for offset in offsets))


# == Scheduler ================================================================


class Scheduling(Case):

    SOURCE = """
        @task
        @cron("*/5 * * * *", misfire={misfire!r}, overlap={overlap!r}, jitter={jitter})
        def report():
            pass
    """

    def scheduler(self, misfire="latest", overlap="allow", jitter=0, expr=None,
                  times=1):
        source = self.SOURCE.format(misfire=misfire, overlap=overlap, jitter=jitter)
        source = source.replace("*/5 * * * *", expr or "*/5 * * * *")
        self.module(source)
        self.app = pybgworker.default_app
        self.app.tasks["tasks.report"].schedules *= times
        self.app.store.create()
        self.events = []
        tasks = pybgworker.Registry.of(self.app, "tasks").tasks
        return pybgworker.Scheduler(
            tasks, self.app.store,
            lambda event, **fields: self.events.append((event, fields)))

    def ticks(self):
        return [row[0] for row in self.sql("select tick from bg_task order by id")]

    def said(self):
        return [event for event, _ in self.events]

    def seconds(self, minutes):
        return (self.now // 300_000 * 300 + minutes * 60) * 1000

    def test_a_new_schedule_waits_for_its_first_tick(self):
        scheduler = self.scheduler()
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(1))
        self.assertEqual(self.ticks(), [])

        scheduler.fire(self.seconds(5))
        self.assertEqual(self.ticks(), [self.seconds(5) // 1000])

    def test_registering_again_keeps_the_next_tick(self):
        for again_at in (4, 5, 6):
            with self.subTest(again_at):
                self.setUp()
                scheduler = self.scheduler()
                scheduler.register(self.seconds(1))
                scheduler.register(self.seconds(again_at))
                scheduler.fire(self.seconds(6))
                self.assertEqual(self.ticks(), [self.seconds(5) // 1000])

    def test_a_changed_expression_starts_anew(self):
        self.scheduler().register(self.seconds(1))
        scheduler = self.scheduler(expr="59 23 * * *")
        scheduler.register(self.seconds(6))
        scheduler.fire(self.seconds(7))
        self.assertEqual(self.ticks(), [])

    def test_a_tick_is_enqueued_by_one_of_many(self):
        schedulers = [self.scheduler() for _ in range(3)]
        for scheduler in schedulers:
            scheduler.register(self.seconds(1))
        rows = schedulers[0].store.schedules()
        for minute in range(1, 40):
            for scheduler in schedulers:
                scheduler.fire(self.seconds(minute))
        self.assertEqual(len(self.ticks()), 7)
        self.assertEqual(len(set(self.ticks())), 7)
        self.assertEqual(len(rows), 1)

    def test_a_stale_look_at_a_schedule_enqueues_nothing(self):
        scheduler = self.scheduler()
        scheduler.register(self.seconds(1))
        row, = scheduler.store.schedules()
        task = self.app.tasks["tasks.report"]
        plan = scheduler._plan(row, task.schedules[0], self.seconds(6))
        step = pybgworker._step_of(row, plan, task, task.schedules[0], self.seconds(6))
        self.assertEqual(scheduler.store.fire([step]), [[1]])
        self.assertEqual(scheduler.store.fire([step]), [None])
        self.assertEqual(len(self.ticks()), 1)

        late = step._replace(row=step.new, new=step.new._replace(set_at=1))
        self.sql("update bg_schedule set set_at = set_at + 1")      # by another clock
        self.assertEqual(scheduler.store.fire([late]), [None])

    def test_misfire_decides_about_ticks_missed_in_a_day(self):
        late = 24 * 60 + 3
        for misfire, count in (("latest", 1), ("skip", 0), ("all", 288)):
            with self.subTest(misfire):
                self.setUp()
                scheduler = self.scheduler(misfire=misfire)
                scheduler.register(self.seconds(1))
                scheduler.fire(self.seconds(late))
                self.assertEqual(len(self.ticks()), count)
                missed = [f["ticks"] for e, f in self.events if e == "cron_missed"]
                self.assertEqual(sum(missed) + count, 288)

    def test_pruning_the_run_does_not_repeat_its_tick(self):
        scheduler = self.scheduler()
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(5))
        self.sql("delete from bg_task")
        scheduler.fire(self.seconds(6))
        self.assertEqual(self.ticks(), [])

    def test_overlap_skip_leaves_out_a_tick_while_a_run_is_unfinished(self):
        scheduler = self.scheduler(overlap="skip")
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(5))
        scheduler.fire(self.seconds(10))
        self.assertEqual(len(self.ticks()), 1)
        self.assertEqual(self.said(), ["cron_fired", "cron_missed"])
        self.assertEqual(self.events[-1][1]["overlap"], "skip")
        row, = scheduler.store.schedules()
        self.assertEqual(row.last_tick, self.seconds(5) // 1000)

        self.sql("update bg_task set state = 4")
        scheduler.fire(self.seconds(15))
        self.assertEqual(len(self.ticks()), 2)

    def test_overlap_skip_runs_one_of_all_missed_ticks_and_says_so(self):
        scheduler = self.scheduler(misfire="all", overlap="skip")
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(31))
        self.assertEqual(self.said(), ["cron_fired", "cron_missed"])
        self.assertEqual(self.events[-1][1]["ticks"], 5)

    def test_jitter_puts_the_run_off_but_not_the_tick(self):
        scheduler = self.scheduler(jitter=100)
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(5))
        (tick, run_at, counted), = self.sql("select tick, run_at, counted from bg_task")
        self.assertEqual(counted, 1)

        self.assertEqual(tick, self.seconds(5) // 1000)
        self.assertTrue(tick * 1000 < run_at < tick * 1000 + 100_000)

    def test_schedules_are_not_edited_into_nonsense(self):
        self.scheduler().register(self.seconds(1))
        for column, value in (("next_tick", "soon"), ("misfire", "odd"), ("jitter", "x"),
                              ("overlap", 1), ("set_at", "x"), ("last_tick", b"x"),
                              ("done", b"x")):
            with self.subTest(column), self.assertRaises(sqlite3.IntegrityError):
                self.sql(f"update bg_schedule set {column} = ?", value)

    def test_a_schedule_that_cannot_be_read_is_logged_and_others_go_on(self):
        for done in ("nonsense", "[[1]]", "[[1e300, 2]]", '[["a", "b"]]', "null",
                     "[[1800000000, 1700000000]]", "[[true, 2]]"):
            with self.subTest(done):
                self.setUp()
                scheduler = self.scheduler(times=2)
                scheduler.register(self.seconds(1))
                self.sql("update bg_schedule set done = ? where number = 1", done)
                scheduler.fire(self.seconds(5))
                scheduler.fire(self.seconds(10))
                self.assertEqual(self.ticks().count(self.seconds(5) // 1000), 1)
                self.assertEqual(self.ticks().count(self.seconds(10) // 1000), 2)
                self.assertIn("cron_error", self.said()[:2])

    def test_many_schedules_of_one_tick_fire_in_bounded_batches(self):
        scheduler = self.scheduler(misfire="all", times=400)
        scheduler.register(self.seconds(1))
        connection, statements = scheduler.store.db.link().connection, []
        looks = [True]
        while looks[-1]:
            del statements[:]
            connection.set_trace_callback(statements.append)
            fired, wait = scheduler.fire(self.seconds(5))
            connection.set_trace_callback(None)
            looks.append(fired)
            self.assertEqual(wait > 0, not fired or len(looks) == 9)
            self.assertLess(len(statements), 50 * 3 + 12)
        self.assertEqual(len(looks) - 2, 8)
        self.assertEqual(len(self.ticks()), 400)

    def test_ticks_missed_for_long_fire_in_bounded_batches(self):
        scheduler = self.scheduler(misfire="all", times=5)
        scheduler.register(self.seconds(1))
        counts = [0]
        while scheduler.fire(self.seconds(5 * 700))[0]:
            counts.append(len(self.ticks()))
        self.assertEqual(counts, [0, 1400, 2800, 3500])

    def test_a_look_reads_only_the_schedules_that_are_due(self):
        scheduler = self.scheduler()
        scheduler.register(self.seconds(1))
        for statement in self.statements_of(scheduler, self.seconds(2)):
            plan = " ".join(row[-1] for row in self.sql("explain query plan " + statement))
            self.assertNotRegex(plan, "SCAN (TABLE )?bg_schedule")
            self.assertIn("bg_schedule_", plan)

    def statements_of(self, scheduler, now):
        found, connection = [], scheduler.store.db.link().connection
        connection.set_trace_callback(found.append)
        scheduler.fire(now)
        connection.set_trace_callback(None)
        return found

    def test_a_schedule_of_others_that_is_never_served_makes_nobody_busy(self):
        scheduler = self.scheduler()
        scheduler.register(self.seconds(1))
        columns = ", ".join(pybgworker.ScheduleRow._fields[1:12])
        self.sql(f"insert into bg_schedule (task, {columns}) "
                 f"select 'gone', {columns} from bg_schedule")
        scheduler.fire(self.seconds(5))
        self.assertEqual(scheduler.fire(self.seconds(6)), (False, 30.0))
        self.assertEqual(len(self.ticks()), 1)

    # -- schedules without a success

    def late_row(self, **values):
        row = pybgworker.ScheduleRow(
            "t", "*/5 * * * *", "UTC", 0, "latest", "allow", 0.0, None, None, "[]", 0, 0,
            alert_after=600.0, since=self.seconds(1))
        return row._replace(**values)

    def test_a_schedule_is_late_when_no_run_has_succeeded_so_long_after_a_tick(self):
        tick = self.seconds(5) // 1000
        for minutes, values, expected in (
            (15, {}, None), (15.1, {}, tick), (99, {}, tick),
            (99, {"alert_after": None}, None),
            (15.1, {"success_at": self.seconds(5) + 9000}, None),   # that tick's run
            (20.1, {"success_at": self.seconds(5) + 9000}, tick + 300),
            (16, {"since": None, "last_tick": tick}, tick),
            (16, {"since": None}, 300),
            (99, {"expr": "by hand"}, None), (99, {"tz": "No/Where"}, None),
        ):
            with self.subTest(minutes=minutes, **values):
                self.assertEqual(
                    pybgworker.late_tick(self.late_row(**values), self.seconds(minutes)),
                    expected)

    def test_who_is_late_is_said_once_for_each_tick_by_one_worker(self):
        schedulers = [self.scheduler() for _ in range(2)]
        for _, schedule in ((s, s) for s in schedulers):
            for name, entry in schedule.tasks.items():
                schedule.tasks[name] = entry._replace(schedules=(
                    (*entry.schedules[0][:5], 600.0),))
            schedule.register(self.seconds(1))
            self.assertTrue(schedule.has_alerts)
        log = []
        for minutes in (14, 16, 17, 18):
            for scheduler in schedulers:
                scheduler._log = lambda event, **fields: log.append((event, fields))
                scheduler.say_late(self.seconds(minutes), "w")
        (event, fields), = log
        self.assertEqual((event, fields["schedule"], fields["tick"]), (
            "late", "tasks.report", pybgworker.iso_time(self.seconds(5))))
        self.assertEqual(self.sql("select who, how, action, target from bg_event"),
                         [("w", "worker", "late", "tasks.report")])
        # It succeeds, and is late again some time later.
        self.sql("update bg_schedule set success_at = ?", self.seconds(18))
        for scheduler in schedulers:
            scheduler.say_late(self.seconds(29), "w")
            scheduler.say_late(self.seconds(31), "w")
        self.assertEqual(len(log), 2)

    def test_alert_after_is_a_span_above_nothing(self):
        for value, seconds in (("2h", 7200.0), (90, 90.0),
                               (pybgworker.timedelta(minutes=1), 60.0)):
            task = self.app.cron("* * * * *", alert_after=value)(
                self.app.task(print, name=f"t{seconds}"))
            self.assertEqual(task.schedules[0].alert_after, seconds)
        for value in (0, "0", "soon", -1, math.nan, object()):
            with self.subTest(value), self.assertRaises(pybgworker.PyBgWorkerError):
                self.app.cron("* * * * *", alert_after=value)

    def test_a_schedule_keeps_when_it_was_first_known(self):
        scheduler = self.scheduler()
        for minutes in (1, 8):
            scheduler.register(self.seconds(minutes))
        row, = self.app.store.schedules()
        self.assertEqual((row.since, row.alert_after), (self.seconds(1), None))

    # -- what a schedule is known by

    def scheduler_of(self, *decorators, name="t"):
        """A program with one task, and @cron of these arguments from top to bottom."""
        app = App(db=str(self.db))
        app.store.create()
        self.addCleanup(app.store.close)
        made = app.task(lambda: None, name=name)
        for arguments in decorators:
            made = app.cron(*arguments)(made)
        self.events = getattr(self, "events", [])
        return pybgworker.Scheduler(
            pybgworker.Registry.of(app, "tasks").tasks, app.store,
            lambda event, **fields: self.events.append((event, fields)))

    def test_a_schedule_added_above_another_moves_no_tick_of_it(self):
        for extra in (("*/10 * * * *",), ("*/5 * * * *", "Europe/Paris"), ("@hourly",)):
            with self.subTest(extra):
                self.setUp()
                before = self.scheduler_of(("*/5 * * * *",))
                before.register(self.seconds(1))
                before.fire(self.seconds(5))
                # Down while the tick at 10 goes by; the new one begins after now.
                after = self.scheduler_of(extra, ("*/5  * * * *",))
                after.register(self.seconds(11))
                after.fire(self.seconds(12))
                self.assertEqual(self.ticks(), [self.seconds(m) // 1000 for m in (5, 10)])

    def test_a_task_whose_name_ends_in_a_number_is_no_schedule_of_another(self):
        one = self.scheduler_of(("*/5 * * * *",), ("*/10 * * * *",))
        two = self.scheduler_of(("0 0 1 1 *",), name="t#2")
        one.register(self.seconds(1))
        two.register(self.seconds(1))
        self.assertEqual(len(one.store.schedules()), 3)
        for scheduler in (one, two):
            scheduler.fire(self.seconds(300))
        self.assertEqual(len(self.ticks()), 2)

    def test_two_versions_side_by_side_serve_what_each_of_them_says(self):
        old = self.scheduler_of(("*/5 * * * *",), ("1-59/10 * * * *",))
        new = self.scheduler_of(("*/5 * * * *", "UTC", "all"), ("3-59/10 * * * *",))
        old.register(self.seconds(0))
        new.register(self.seconds(0))
        for minute in range(1, 31):
            for scheduler in (old, new, old):
                scheduler.fire(self.seconds(minute))
            if minute % 7 == 0:             # restarts of both
                old.register(self.seconds(minute))
                new.register(self.seconds(minute))
        base = self.seconds(0) // 1000
        of_hour = base % 3600 // 60
        wanted = sorted(base + m * 60 for m in range(1, 31)
                        if (of_hour + m) % 5 == 0 or (of_hour + m) % 10 in (1, 3))
        self.assertEqual(sorted(self.ticks()), wanted)

    def test_a_schedule_that_the_program_had_before_is_dropped_after_a_day(self):
        self.scheduler_of(("*/5 * * * *",), ("0 * * * *",)).register(self.seconds(1))
        self.scheduler_of(("*/5 * * * *",), name="other").register(self.seconds(1))
        new = self.scheduler_of(("*/5 * * * *",))
        new.register(self.seconds(60))
        self.assertEqual(len(new.store.schedules()), 3)
        new.register(self.seconds(27 * 60))
        self.assertEqual([(r.task, r.expr) for r in new.store.schedules()],
                         [("other", "*/5 * * * *"), ("t", "*/5 * * * *")])

    # -- the clock and the zone

    def test_a_clock_that_was_behind_and_is_corrected_repeats_nothing(self):
        for misfire in ("latest", "skip", "all"):
            for wrong in (-4 * 60, -30 * 60, -self.now // 60_000):      # minutes
                with self.subTest(f"{misfire} {wrong}"):
                    self.setUp()
                    scheduler = self.scheduler(misfire=misfire)
                    scheduler.register(self.seconds(1))
                    scheduler.fire(self.seconds(5))
                    true = [self.seconds(m) // 1000 for m in (5, 10, 15)]
                    for minute in (6, 7, 8):
                        scheduler.fire(self.seconds(minute + wrong))
                    self.scheduler(misfire=misfire).register(self.seconds(8 + wrong))
                    for minute in (9, 10, 11, 15):
                        scheduler.fire(self.seconds(minute))
                    self.assertEqual(self.ticks(), true)

    def test_a_machine_that_starts_in_1970_owes_no_ticks_of_half_a_century(self):
        for misfire in ("latest", "skip", "all"):
            with self.subTest(misfire):
                self.setUp()
                scheduler = self.scheduler(misfire=misfire)
                scheduler.register(30_000)
                scheduler.fire(300_000)
                for minute in (6, 10):
                    scheduler.fire(self.seconds(minute))
                self.assertEqual(self.ticks(), [300, self.seconds(10) // 1000])

    def test_a_clock_that_was_years_ahead_silences_nothing(self):
        year = 366 * 24 * 60
        for first_seen in (1, year, 3 * year):
            with self.subTest(first_seen):
                self.setUp()
                scheduler = self.scheduler()
                scheduler.register(self.seconds(first_seen))
                scheduler.fire(self.seconds(5))
                scheduler.fire(self.seconds(year + 6))
                found, wait = scheduler.fire(self.seconds(7))
                self.assertLessEqual(wait, 30)
                for minute in (10, 11, 15):
                    scheduler.fire(self.seconds(minute))
                base = self.seconds(0) // 1000
                near = [(tick - base) // 60 for tick in self.ticks()
                        if tick < self.seconds(20) // 1000]
                self.assertEqual(near[-2:], [10, 15])

                scheduler.fire(self.seconds(year + 5))      # a year later
                scheduler.fire(self.seconds(year + 10))
                self.assertEqual(len(self.ticks()), len(set(self.ticks())))
                self.assertIn(self.seconds(year + 10) // 1000, self.ticks())

    def test_a_worker_that_starts_with_a_clock_behind_repeats_nothing(self):
        scheduler = self.scheduler(misfire="all")
        scheduler.register(self.seconds(-60))
        scheduler.fire(self.seconds(5))
        ran = self.ticks()
        again = self.scheduler(misfire="all")
        again.register(self.seconds(-30))
        for minute in (-29, -25, 0, 5, 6):
            again.fire(self.seconds(minute))
        self.assertEqual(self.ticks(), ran)

    def test_new_zone_data_neither_loses_nor_doubles_a_tick(self):
        """The clocks of the zone do not go back on the day that was foreseen."""
        day = self.now // 86_400_000 * 86_400       # unix seconds of a midnight, UTC
        for before, after in ((1, 2), (2, 1)):
            for ran in (False, True):       # today's tick, before the data is new
                with self.subTest(f"{before} to {after}, ran: {ran}"):
                    self.setUp()
                    scheduler = self.scheduler(expr="0 9 * * *")
                    task = scheduler.tasks["tasks.report"]
                    about = ("0 9 * * *", "Nowhere/Land", *task.schedules[0][2:])
                    scheduler.tasks["tasks.report"] = task._replace(schedules=[about])
                    zone = {h: dt.timezone(dt.timedelta(hours=h)) for h in (1, 2)}
                    with mock.patch.object(pybgworker, "_zone", lambda *_: zone[before]):
                        scheduler.register((day + 1 * 3600) * 1000)
                    if ran:
                        scheduler.fire((day + (9 - before) * 3600) * 1000)
                    with mock.patch.object(pybgworker, "_zone", lambda *_: zone[after]):
                        scheduler.register((day + (6 + 2 * ran) * 3600) * 1000 + 1)
                    for hour in range(7 + ran, 24):
                        scheduler.fire((day + hour * 3600) * 1000 + 1)
                    hours = [(tick - day) // 3600 for tick in self.ticks()]
                    self.assertEqual(hours, [9 - before if ran else 9 - after])
                    self.assertLessEqual(
                        self.sql("select max(created_at - tick * 1000) from bg_task"),
                        [(1,)])

    def test_a_clock_set_back_a_little_repeats_nothing_and_a_lot_starts_anew(self):
        scheduler = self.scheduler()
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(5))
        scheduler.fire(self.seconds(-50))
        scheduler.fire(self.seconds(5))
        self.assertEqual(len(self.ticks()), 1)

        scheduler.fire(self.seconds(-24 * 60 + 1))
        scheduler.fire(self.seconds(-24 * 60 + 5))
        self.assertEqual(self.ticks()[1:], [self.seconds(-24 * 60 + 5) // 1000])

    def finish(self, now, *outcomes):
        """End the runs of all that is ready, in one turn, each with one of these."""
        order = pybgworker.ClaimOrder(1, None, {"tasks.report", "t"}, 9, 0, set(), {})
        turned = self.app.store.turn(pybgworker.Turn(1, order=order), now, 5.0)
        self.assertEqual(len(turned.claimed.runs), len(outcomes))
        self.app.store.turn(pybgworker.Turn(1, outcomes=[
            Outcome(run, **outcome) for run, outcome in zip(turned.claimed.runs, outcomes)
        ]), now, 5.0)

    WELL = {"state": pybgworker.SUCCESS, "result": "1"}
    BADLY = {"state": pybgworker.FAILED, "error": {"kind": "exception"}}

    def known(self):
        """The last task of each schedule, and when one of them succeeded."""
        return [(row.last_id, row.success_at) for row in self.app.store.schedules()]

    def test_a_schedule_knows_its_last_task_and_its_last_success(self):
        scheduler = self.scheduler()
        add_workers(self.app.store, 1)
        scheduler.register(self.seconds(1))
        self.assertEqual(self.known(), [(None, None)])
        scheduler.fire(self.seconds(5))
        self.assertEqual(self.known(), [(1, None)])
        self.finish(self.seconds(6), self.BADLY)
        self.assertEqual(self.known(), [(1, None)])
        self.app.store.retry(1, self.seconds(7))
        self.finish(self.seconds(7), self.WELL)
        self.assertEqual(self.known(), [(1, self.seconds(7))])
        scheduler.register(self.seconds(8))             # of the next program, too
        scheduler.fire(self.seconds(10))
        self.assertEqual(self.known(), [(2, self.seconds(7))])
        self.app.tasks["tasks.report"].delay()          # by hand: no tick of it
        self.finish(self.seconds(11), self.BADLY, self.WELL)
        self.assertEqual(self.known(), [(2, self.seconds(7))])

    def test_runs_that_take_longer_than_the_schedules_pause_are_successes_too(self):
        scheduler = self.scheduler(misfire="all")
        add_workers(self.app.store, 1)
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(15))
        self.assertEqual(self.known(), [(3, None)])
        self.finish(self.seconds(16), self.WELL, self.WELL, self.BADLY)
        self.assertEqual(self.known(), [(3, self.seconds(16))])

    def test_of_two_schedules_of_one_task_the_success_is_that_ones_whose_last_it_is(self):
        scheduler = self.scheduler(times=2)
        add_workers(self.app.store, 1)
        scheduler.register(self.seconds(1))
        scheduler.fire(self.seconds(5))
        self.assertEqual(self.known(), [(1, None), (2, None)])
        self.finish(self.seconds(6), self.BADLY, self.WELL)
        self.assertEqual(self.known(), [(1, None), (2, self.seconds(6))])


# == Reports ==================================================================


class Reports(QueueCase):

    def test_spans_are_for_eyes(self):
        for seconds, text in ((None, "-"), (0.0001, "0.1 ms"), (0.5, "500 ms"),
                              (3.44, "3.4 s"), (300, "5.0 min"), (7200, "2.0 h"),
                              (864000, "10.0 d")):
            self.assertEqual(pybgworker.span(seconds), text)

    def test_a_table_is_aligned_numbers_to_the_right(self):
        rows = [{"a": 1, "b": "x"}, {"a": 100, "b": None}]
        self.assertEqual(pybgworker.table(rows, ["a", "b"]), "  A  B\n  1  x\n100  -")

    def test_percentiles(self):
        values = list(range(100))
        self.assertEqual([pybgworker.percentile(values, p) for p in (0.5, 0.95, 1)],
                         [50, 95, 99])
        self.assertIsNone(pybgworker.percentile([], 0.5))

    def test_show_tells_all_that_is_kept(self):
        self.enqueue(args=pybgworker.encode_call((1, b"x"), {"k": (2,)}), retries=0)
        run, = self.claim()
        error = {"kind": "exception", "type": "E", "message": "m", "traceback": "T"}
        self.finish(run, pybgworker.FAILED, error=error, output="said", duration=0.5)
        report = pybgworker.show_report(self.store, 1)

        self.assertEqual(report["args"], [1, "b'x'"])
        self.assertEqual(report["kwargs"], {"k": [2]})
        self.assertEqual(report["error"], error)
        self.assertEqual((report["output"], report["duration"]), ("said", 0.5))
        text = pybgworker.show_text(report)
        self.assertIn("E: m", text)
        self.assertRegex(text, r"(?m)^duration +500 ms$")

    def test_a_terminal_obeys_nothing_that_a_task_left_behind(self):
        """Controls, marks of direction and lone surrogates: in names, errors, output."""
        bad = "\x1b]0;owned\x07 \x9b2J \u202egnp.exe"
        self.enqueue(name=f"n{bad}", retries=0)
        run, = self.claim(names={f"n{bad}"})
        error = {"kind": "exception", "type": "E", "message": bad,
                 "traceback": f"T{bad}\ud800"}
        self.turn(history=pybgworker.RunCounts(), outcomes=[Outcome(
            run, pybgworker.FAILED, error=error, output=f"said\t{bad}\n")])
        self.store.pause(bad, self.now)
        texts = [
            pybgworker.show_text(pybgworker.show_report(self.store, 1), colour=False),
            pybgworker.list_text(pybgworker.list_report(self.store, None, None, None, 9)),
            pybgworker.inspect_text(pybgworker.inspect_report(self.store, self.now, 15)),
            pybgworker.stats_text(pybgworker.stats_report(self.store, self.now)),
        ]
        for text in texts:
            self.assertNotRegex(text, "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")
            self.assertIn("\\x1b]0;owned\\x07", text)
        self.assertIn("said\t", texts[0])

    def test_inspect_says_why_children_are_not_forked(self):
        report = pybgworker.inspect_report(self.store, self.now, 15)
        worker = {"pid": 1, "host": "h", "queues": None, "concurrency": 2, "running": 0,
                  "heartbeat_age": 1.0, "dead": False, "stale": False}
        report["workers"] = [
            {**worker, "name": "one", "start_method": "spawn, because of a pipe"},
            {**worker, "name": "two", "start_method": "fork"},
            {**worker, "name": "new", "start_method": None}]
        text = pybgworker.inspect_text(report)
        self.assertRegex(text, "START_METHOD .*\n.* spawn .*\n.* fork .*\n")
        self.assertTrue(text.endswith("\none: spawn, because of a pipe"))

    def test_times_for_eyes_are_local_and_say_so(self):
        zone = os.environ.get("TZ")
        os.environ["TZ"] = "XST-5:30"           # POSIX: five and a half hours ahead
        time.tzset()
        try:
            self.assertEqual(pybgworker.local_time("2026-01-31T20:00:00.123Z"),
                             "2026-02-01 01:30:00")
            self.enqueue()
            row = pybgworker.list_report(self.store, None, None, None, 9)
            self.assertIn("times are local: XST, UTC+0530", pybgworker.list_text(row))
            text = pybgworker.show_text(pybgworker.show_report(self.store, 1))
            self.assertRegex(text, r"(?m)^created_at +\S+ \S+ \+0530$")
        finally:
            os.environ.pop("TZ") if zone is None else os.environ.update(TZ=zone)
            time.tzset()

    def test_what_was_written_by_hand_is_shown_as_it_is(self):
        for stamp in ("soon", "99999-01-01T00:00:00Z", "17 ms"):
            self.assertEqual(pybgworker.local_time(stamp), stamp)
        self.assertEqual(pybgworker.local_time(None), "-")
        deep = "[" * 500_000 + "]" * 500_000
        self.assertEqual(pybgworker._readable(deep), deep)

    def test_stats_count_and_measure_each_task(self):
        ended = Counting().ended
        counts = pybgworker.RunCounts()
        counts.add([ended(name="t", ran=seconds, waited=1000)
                    for seconds in (0.1, 0.2, 0.3) for _ in range(20)])
        counts.add([ended(state=pybgworker.FAILED, kind="crash", queue="other"),
                    ended(state=pybgworker.RETRYING, kind="crash"), ended(name="u")])
        with self.store.db.write() as link:
            pybgworker.add_history(link.connection, counts, self.now)
        row, other = pybgworker.stats_report(self.store, self.now + 1)
        self.assertEqual(other["name"], "u")
        self.assertEqual(list(row.values())[:6], ["t", 62, 1, 1, 0, 1.033])
        self.assertAlmostEqual(row["duration_p50"], 0.175, places=3)
        self.assertTrue(0.25 < row["duration_p95"] <= 0.5)
        self.assertTrue(0.5 < row["waited_p50"] <= 1.0)
        self.assertRegex(pybgworker.stats_text([row, other]),
                         r"(?s)NAME +RUNS +FAILED +RETRIED +PER_MINUTE +≈DURATION_P50 .*\n"
                         r"t +62 +1 +1 +1.033 +\S+ ms .*\nu +1 ")
        later = self.now + 2 * HOUR
        self.assertEqual(pybgworker.stats_report(self.store, later)[0]["per_minute"], 0)
        self.assertEqual(pybgworker.stats_report(self.store, later, 1.5), [])
        self.assertEqual(pybgworker.stats_text([]), "no run has ended in this time")

    def test_the_hours_of_stats_are_a_number_of_which_something_is_known(self):
        for hours in ("0", "-1", "nan", "inf", "9601", "a", ""):
            with self.subTest(hours), self.assertRaises(SystemExit) as caught, \
                    contextlib.redirect_stderr(io.StringIO()) as errors:
                pybgworker.main(["stats", "--db", str(self.db), f"--hours={hours}"])
            self.assertEqual(caught.exception.code, 2)
            self.assertIn("a number of hours, up to 9600", errors.getvalue())
        with self.store.db.write() as link:
            pybgworker.add_history(link.connection, counts_of(name="ß"),
                                   pybgworker.now_ms())
        for flags in ([], ["--hours", "0.5"]):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                self.assertEqual(pybgworker.main(
                    ["stats", "--json", "--db", str(self.db), *flags]), 0)
            row, = json.loads(out.getvalue())
            self.assertEqual((row["name"], row["runs"], row["per_minute"]), ("ß", 1, 0.017))

    def test_stats_look_at_minutes_quarters_or_days(self):
        with self.store.db.write() as link:
            for hours in (1, 5, 30, 200, 1000):
                pybgworker.add_history(link.connection, counts_of(),
                                       self.now - hours * HOUR)
        while self.store.roll_up(self.now):
            pass
        for hours, wanted in ((0.5, 0), (2, 1), (3, 1), (6, 2), (24, 2), (31, 3), (192, 3),
                              (300, 4), (1100, 5), (9600, 5)):
            found = pybgworker.stats_report(self.store, self.now, hours)
            with self.subTest(hours=hours):
                self.assertEqual([row["runs"] for row in found], [wanted] * bool(wanted))


# == Why ======================================================================


class Why(QueueCase):

    def why(self, task_id=1, **changes):
        return pybgworker.why(self.store, task_id, self.now)

    def test_a_task_that_is_over(self):
        self.enqueue()
        run, = self.claim()
        self.finish(run, duration=1.2, started_at=self.now)
        self.now += 3000
        found = self.why()
        self.assertEqual(found.code, "success")
        self.assertRegex(found.say, r"^It succeeded at \S+ \S+, 3 s ago: run 1 took 1.2 s "
                         r"on w\.$")

    def test_the_readme_has_the_codes(self):
        text = (HERE / "README.md").read_text(encoding="utf-8")
        for table in (pybgworker.REASONS, pybgworker.ALERTS):
            rows = "\n".join(f"| `{code}` | {meaning} |" for code, meaning in table.items())
            self.assertIn(rows, text)


# == Overview =================================================================


class OverviewCase(QueueCase):
    """A database with a history, at 14:02:31 by the test's clock."""

    def setUp(self):
        super().setUp()
        self.sql("delete from bg_worker")
        self.now = 1_795_615_351_000        # 2026-11-25T14:02:31Z
        self.minute = self.now // 60_000 * 60
        self.app.configure(worker_timeout=15)

    def look(self, span="hour", beats=None):
        return pybgworker.overview(self.store, self.app.settings, self.now, span, beats)

    def history(self, minutes_ago=0, name="t", queue="default", span=60, ids=(1, 1),
                ran=(), waited=(), **counts):
        """A row of history; `ran` and `waited` are {bucket: runs}."""
        at = (self.now // 1000 - minutes_ago * 60) // span * span
        columns = {"span": span, "at": at, "name": name, "queue": queue,
                   "lo": ids[0], "hi": ids[1], **counts,
                   **{f"r{n}": count for n, count in dict(ran).items()},
                   **{f"w{n}": count for n, count in dict(waited).items()}}
        marks = ", ".join("?" * len(columns))
        self.sql(f"insert into bg_history ({', '.join(columns)}) values ({marks})",
                 *columns.values())

    def tasks(self, count, state, queue="default", name="t", ago=0.0, due_ago=None,
              **more):
        """So many rows; `ago` are seconds since they were enqueued."""
        created = self.now - round(ago * 1000)
        due = created if due_ago is None else self.now - round(due_ago * 1000)
        first = self.sql("select ifnull(max(id), 0) + 1 from bg_task")[0][0]
        values = {"state": state, "queue": queue, "name": name, "priority": 5,
                  "retries": 3, "run_at": due, "created_at": created,
                  "args": "[[],{}]", **more}
        self.sql(f"""
            with recursive n (i) as (select ? union all select i + 1 from n where i < ?)
            insert into bg_task (id, {', '.join(values)})
            select i, {', '.join('?' * len(values))} from n""",
                 first, first + count - 1, *values.values())
        return first

    def worker_row(self, name="w1", concurrency=4, up=100.0, beat_ago=1.0, **more):
        values = {"name": name, "pid": 11, "host": "h", "boot": "b", "port": 0,
                  "token": "", "concurrency": concurrency, "state": "ready",
                  "started_at": self.now - round(up * 1000),
                  "beat_at": self.now - round(beat_ago * 1000), **more}
        self.sql(f"insert into bg_worker ({', '.join(values)}) "
                 f"values ({', '.join('?' * len(values))})", *values.values())
        return self.sql("select max(id) from bg_worker")[0][0]

    def failed(self, name, message, ago=0.0, type="ValueError", kind="exception",
               count=1):
        first = self.tasks(count, pybgworker.FAILED, name=name, ago=4000,
                           finished_at=self.now - round(ago * 1000))
        error = json.dumps({"kind": kind, "type": type, "message": message})
        self.sql("insert into bg_payload select id * 8 + 2, ? from bg_task "
                 "where id between ? and ?", error, first, first + count - 1)
        return first


class Overviews(OverviewCase):

    def test_of_an_empty_database_there_is_nothing_to_see(self):
        view = self.look()
        self.assertEqual(view["figures"], {
            "runs_per_minute": 0, "runs": 0, "failed": 0, "failed_share": None,
            "waiting": 0, "oldest": None, "later": 0, "next_in": None, "busy": 0,
            "children": 0, "workers": 0, "wait_p50": None, "wait_p95": None})
        for part in ("queues", "running", "failures", "workers", "next"):
            self.assertEqual(view[part], [], part)
        self.assertEqual([alert["code"] for alert in view["attention"]], [])
        self.assertEqual(len(view["series"]), 61)
        self.assertEqual(view["at"], "2026-11-25T14:02:31.000Z")

    def test_figures_are_of_the_last_minute_and_the_last_ten(self):
        self.history(0, runs=20, exceptions=2, retried=2, waited={6: 20})
        self.history(1, runs=60, timeouts=1, failed=1, waited={6: 60})
        self.history(9, runs=20, crashed=1, lost=1, aborted=1, waited={9: 20})
        self.history(30, runs=1000, exceptions=1000, waited={20: 1000})
        figures = self.look()["figures"]
        self.assertEqual(figures["runs_per_minute"], 20 + round(60 * 29 / 60))
        self.assertEqual((figures["runs"], figures["failed"]), (100, 6))
        self.assertEqual(figures["failed_share"], 0.06)
        self.assertLessEqual(figures["wait_p50"], 0.1)
        self.assertTrue(0.5 < figures["wait_p95"] <= 1, figures["wait_p95"])

    def test_figures_count_what_waits_and_what_comes_later(self):
        self.tasks(3, pybgworker.QUEUED, due_ago=90)
        self.tasks(2, pybgworker.SCHEDULED, queue="mail", due_ago=-8)
        self.tasks(1, pybgworker.RETRYING, queue="mail", due_ago=-3)
        figures = self.look()["figures"]
        self.assertEqual((figures["waiting"], figures["later"]), (3, 3))
        self.assertEqual((figures["oldest"], figures["next_in"]), (90, 3))

    def test_a_series_has_a_point_for_each_minute_of_the_hour(self):
        self.history(0, runs=5, exceptions=1, cancelled=1, waited={0: 5})
        self.history(0, name="u", runs=5, waited={3: 5})
        self.history(60, runs=7)
        self.history(61, runs=100)
        series = self.look()["series"]
        self.assertEqual(series[-1]["t"], "2026-11-25T14:02:00.000Z")
        self.assertEqual((series[-1]["ok"], series[-1]["bad"]), (8, 1))
        self.assertTrue(0 < series[-1]["p50"] <= 0.001 < series[-1]["p95"] <= 0.01)
        self.assertEqual((series[0]["ok"], series[0]["p50"]), (7, None))
        self.assertEqual(sum(point["ok"] for point in series), 15)

    def test_the_newest_quarters_of_a_day_are_minutes_still(self):
        self.history(30, span=900, runs=50)         # 13:30: rolled up
        self.history(30, runs=50)                   # … its minutes are kept longer
        self.sql("insert into bg_meta values ('rolled_to', ?)", self.minute - 17 * 60)
        self.history(10, runs=3)
        self.history(3, runs=4)
        self.history(0, runs=1)
        series = self.look("day")["series"]
        self.assertEqual(len(series), 97)
        self.assertEqual([(point["t"][11:16], point["ok"]) for point in series[-3:]],
                         [("13:30", 50), ("13:45", 7), ("14:00", 1)])

    def test_queues_say_what_comes_in_and_goes_out(self):
        self.tasks(5, pybgworker.SUCCESS, ago=90)
        self.tasks(30, pybgworker.SUCCESS, ago=20)
        self.tasks(12, pybgworker.QUEUED, ago=30)
        self.tasks(7, pybgworker.SCHEDULED, ago=5, due_ago=-60)     # not to run yet
        self.history(0, runs=15, retried=5)
        self.history(1, runs=60)
        self.history(20, runs=90)
        queue, = self.look()["queues"]
        out = round(10 + 60 * 29 / 60)
        self.assertEqual(
            {key: queue[key] for key in ("queue", "waiting", "later", "oldest",
                                         "in_per_minute", "out_per_minute")},
            {"queue": "default", "waiting": 12, "later": 7, "oldest": 30,
             "in_per_minute": 42, "out_per_minute": out})
        self.assertEqual(queue["bars"], [0] * 13 + [60, out])
        self.assertEqual(queue["busiest"], 90)
        self.assertAlmostEqual(queue["empty_in"], 12 / (10 + 29) * 60)

    def test_many_that_came_in_are_counted_by_the_newest(self):
        """Of more than it looks at, the pace of those it sees."""
        self.tasks(100, pybgworker.SUCCESS, ago=50)
        self.tasks(100, pybgworker.QUEUED, ago=20)
        self.tasks(100, pybgworker.QUEUED, ago=10, queue="mail")
        self.assertEqual(self.store.arrivals(self.now, 1000),
                         {"default": 200.0, "mail": 100.0})
        self.assertEqual(self.store.arrivals(self.now, 150),
                         {"default": 150.0, "mail": 300.0})     # of 20 s

    def test_when_a_queue_will_be_empty(self):
        def empty_in(arrived, waiting, finished, paused=None, earlier=0):
            row = pybgworker.QueueRow("q", queued=waiting, paused_at=paused)
            pace = {self.minute: finished, self.minute - 600: earlier}
            return pybgworker._queue_row(row, self.now, arrived, pace)["empty_in"]

        for case, expected in (
            ((0, 0, 0), None), ((100, 0, 0), None),
            ((0, 60, 120), 30.0), ((120, 60, 120), 30.0),
            ((140, 60, 120), 30.0),             # more comes, but less than a minute's
            ((140, 200, 120), "never"), ((130, 200, 120), 100.0),
            ((0, 10, 0), "never"),              # nothing has been done for a while
            ((0, 10, 0, None, 150), 60.0),      # of 15 minutes: one says too little
            ((0, 10, 500, self.now - 1), "paused"),
        ):
            with self.subTest(case):
                self.assertEqual(empty_in(*case), expected)

    def test_a_paused_queue_says_since_when_by_whom_and_why(self):
        self.store.pause("mail", self.now, pybgworker.By("ann", "cli"), "SMTP is down")
        queue, = self.look()["queues"]
        self.assertEqual((queue["queue"], queue["empty_in"]), ("mail", "paused"))
        self.assertEqual(queue["paused"], {
            "since": "2026-11-25T14:02:31.000Z", "by": "ann", "reason": "SMTP is down"})

    def test_what_runs_is_the_longest_first_with_what_its_child_uses(self):
        worker = self.worker_row(concurrency=2, memory=1000, cpu=1.0, children_cpu=2.0)
        one = self.tasks(1, pybgworker.RUNNING, name="slow", worker=worker, attempt=2,
                         started_at=self.now - 9000)
        two = self.tasks(1, pybgworker.RUNNING, name="new", worker=worker, attempt=1,
                         started_at=self.now - 500)
        three = self.tasks(1, pybgworker.RUNNING, name="piped", worker=worker, attempt=1,
                           started_at=self.now - 4000)
        self.sql("insert into bg_run values (?, ?, 2, 77, ?, null), (?, ?, 1, 77, null, ?)",
                 one, worker, self.now - 8000, three, worker, one)
        self.sql("insert into bg_child values (?, 77, 1, 5000, 3.5)", worker)
        self.sql("insert into bg_payload values (?, '[62, \"frame\"]')", one * 8 + 4)
        beats = pybgworker.Beats()
        self.look(beats=beats)
        self.sql("update bg_child set cpu = 6.0")
        self.sql("update bg_worker set beat_at = beat_at + 5000, children_cpu = 6.0")
        view = self.look(beats=beats)

        first = view["running"][0]
        self.assertEqual((first["id"], first["name"], first["for"]), (one, "slow", 8))
        self.assertEqual((first["worker"], first["pid"], first["attempt"]), ("w1", 77, 2))
        self.assertEqual((first["progress"], first["memory"]), ([62, "frame"], 5000))
        self.assertEqual((first["cpu"], first["in_pipe"]), (0.5, False))
        self.assertEqual([(run["id"], run["for"], run["in_pipe"], run["pid"])
                          for run in view["running"][1:]],
                         [(three, 4, True, 77), (two, 0.5, False, None)])
        self.assertEqual(view["running_total"], 3)
        report, = view["workers"]
        self.assertEqual((report["busy"], report["children"], report["running"]), (2, 2, 3))
        self.assertEqual((report["memory"], report["cpu"]), (6000, 0.8))

    def test_at_most_twenty_that_run_are_shown_those_that_began_first(self):
        worker = self.worker_row(concurrency=40)
        for number in range(30):
            self.tasks(1, pybgworker.RUNNING, worker=worker, attempt=1,
                       started_at=self.now - 1000 * number)
        self.sql("insert into bg_run select id, worker, attempt, 7, started_at, null "
                 "from bg_task")
        view = self.look()
        self.assertEqual([run["for"] for run in view["running"]], [*range(29, 9, -1)])
        self.assertEqual(view["running_total"], 30)

    def test_what_is_in_hand_of_a_run_before_is_not_of_this_one(self):
        worker = self.worker_row()
        task = self.tasks(1, pybgworker.RUNNING, worker=worker, attempt=2,
                          started_at=self.now - 2000)
        gone = self.tasks(1, pybgworker.SUCCESS)
        self.sql("insert into bg_run values (?, ?, 1, 77, ?, null), (?, ?, 1, 77, ?, null), "
                 "(999, ?, 1, 77, ?, null)", task, worker, self.now - 60_000, gone,
                 worker, self.now - 60_000, worker, self.now - 60_000)
        run, = self.look()["running"]
        self.assertEqual((run["id"], run["pid"], run["for"]), (task, None, 2))

    def test_the_share_of_a_cpu_is_known_from_two_heartbeats(self):
        beats = pybgworker.Beats()
        self.assertIsNone(beats.share("a", 1000, 5.0))
        self.assertIsNone(beats.share("a", 1000, 5.0))
        self.assertEqual(beats.share("a", 6000, 7.5), 0.5)
        self.assertEqual(beats.share("a", 6000, 7.5), 0.5)      # until the next
        self.assertEqual(beats.share("a", 7000, 7.0), 0.0)      # the pid's next owner
        self.assertIsNone(beats.share("b", 7000, None))
        beats.keep(["b"])
        self.assertIsNone(beats.share("a", 9000, 9.0))

    def test_before_the_second_heartbeat_a_worker_has_the_share_of_all_its_time(self):
        self.worker_row(cpu=5.0, children_cpu=20.0, up=100)
        self.worker_row(name="old")             # of a version that does not say
        self.assertEqual([row["cpu"] for row in self.look()["workers"]], [0.25, None])

    def test_busy_children_are_counted_by_heartbeats_where_they_run_several(self):
        worker = self.worker_row(concurrency=4)
        self.tasks(9, pybgworker.RUNNING, worker=worker, attempt=1)
        self.assertEqual(self.look()["workers"][0]["busy"], 4)
        self.sql("insert into bg_child values (?, 1, 9, 0, 0), (?, 2, 0, 0, 0)",
                 worker, worker)
        view = self.look()
        self.assertEqual(view["workers"][0]["busy"], 1)
        self.assertEqual(view["figures"]["busy"], 1)

    def test_a_worker_is_as_it_says_or_stale_or_dead(self):
        self.worker_row(state="starting", note="no children: ImportError", queues='["a"]',
                        version="2.0", start_method="fork")
        self.worker_row(name="w2", beat_ago=16)
        self.worker_row(name="w3", queues="{")
        with mock.patch.object(pybgworker, "judge_of",
                               return_value=lambda row: row.name == "w3"):
            rows = pybgworker.workers_report(self.store, self.app.settings, self.now)
            figures = self.look()["figures"]
        self.assertEqual([row["state"] for row in rows], ["starting", "stale", "dead"])
        self.assertEqual([row["queues"] for row in rows], [["a"], None, ["{"]])
        self.assertEqual((rows[0]["note"], rows[0]["version"], rows[0]["start_method"]),
                         ("no children: ImportError", "2.0", "fork"))
        self.assertEqual((rows[1]["beat_age"], rows[1]["up"]), (16, 100))
        self.assertEqual((figures["workers"], figures["children"]), (1, 4))

    def test_failures_are_grouped_by_what_went_wrong(self):
        self.failed("hook", "host 10.0.0.7: timed out after 3 s", ago=500, count=3)
        self.failed("hook", "host 10.0.0.9: timed out after 30 s", ago=2)
        self.failed("pay", "'user_id'", ago=9, type="KeyError")
        self.failed("pay", "0x7f21ab3c is \"odd\"", ago=8, type="")
        self.failed("pay", "deadbeef01 is \"even\"", ago=7, type="")
        self.failed("pay", "old", ago=3601)
        report = pybgworker.failures_report(self.store, self.now)
        self.assertEqual(
            [(row["count"], row["name"], row["error"], row["last_age"])
             for row in report["groups"]],
            [(4, "hook", "ValueError: host ….….….…: timed out after … s", 2),
             (2, "pay", "exception: … is …", 7),
             (1, "pay", "KeyError: 'user_id'", 9)])
        self.assertEqual((report["total"], report["capped"]), (7, False))
        self.assertEqual(report["groups"][0]["ids"], [4, 3, 2])
        self.assertEqual(report["groups"][0]["first_at"], "2026-11-25T13:54:11.000Z")
        self.assertEqual(sorted(pybgworker.failure_ids(self.store, self.now, 1, 2)),
                         [1, 2, 3, 4])
        self.assertEqual(pybgworker.failure_ids(self.store, self.now, 1, 99), [])

    def test_only_the_newest_thousand_failures_are_looked_at(self):
        self.failed("a", "m", ago=3, count=1100)
        report = pybgworker.failures_report(self.store, self.now)
        self.assertEqual((report["total"], report["capped"]), (1000, True))
        self.assertTrue(self.look()["failures_capped"])

    def test_schedules_come_with_their_last_run_the_first_first(self):
        at = self.now // 1000
        done = self.tasks(1, pybgworker.SUCCESS, duration=2.1, finished_at=self.now - 1000)
        for name, next_tick, last_id in (("b", at + 60, done), ("a", at + 3, 99),
                                         ("never", None, None)):
            self.sql("""insert into bg_schedule (task, expr, tz, number, misfire, overlap,
                jitter, next_tick, last_tick, done, set_at, seen_at, last_id)
                values (?, '* * * * *', 'UTC', 0, 'latest', 'allow', 0, ?, ?, '', 0, 0, ?)""",
                     name, next_tick, at - 57, last_id)
        rows = pybgworker.schedules_report(self.store, self.now)
        self.assertEqual([(row["schedule"], row["next_in"]) for row in rows],
                         [("a", 3), ("b", 60), ("never", None)])
        self.assertEqual(rows[1]["last"], {"id": done, "status": "success", "duration": 2.1,
                                           "at": "2026-11-25T14:02:30.000Z"})
        self.assertIsNone(rows[0]["last"])          # it is deleted already
        self.assertEqual(rows[0]["last_at"], "2026-11-25T14:01:34.000Z")
        self.assertEqual([row["schedule"] for row in self.look()["next"]], ["a", "b"])

    def test_names_have_the_figures_of_a_day(self):
        self.history(60, span=900, name="a", runs=10, failed=1, retried=2, exceptions=3,
                     cancelled=1, ran={9: 10}, waited={3: 10})
        self.history(3, name="a", runs=10, ran={12: 10}, waited={3: 10})
        self.history(3, name="b", runs=1)
        self.history(25 * 60, span=900, name="yesterday", runs=1)
        a, b = pybgworker.names_report(self.store, self.now)
        self.assertEqual((a["name"], a["runs"], a["failures"]), ("a", 20, 3))
        self.assertEqual((a["failed"], a["retried"], a["cancelled"]), (1, 2, 1))
        self.assertTrue(0.5 < a["ran_p50"] <= 1 and 5 < a["ran_p95"] <= 10, a)
        self.assertTrue(0.005 < a["wait_p50"] < a["wait_p95"] <= 0.01, a)
        self.assertEqual((b["name"], b["runs"], b["ran_p95"]), ("b", 1, None))

    def test_events_go_on_where_they_ended(self):
        for number in range(3):
            self.store.note_event(pybgworker.By("ann", "web"), "pause", f"q{number}",
                                  "tired", self.now)
        first = pybgworker.events_report(self.store, limit=2)
        self.assertEqual([event["target"] for event in first["events"]], ["q2", "q1"])
        self.assertEqual(first["events"][0], {
            "id": 3, "at": "2026-11-25T14:02:31.000Z", "who": "ann", "how": "web",
            "action": "pause", "target": "q2", "detail": "tired"})
        rest = pybgworker.events_report(self.store, first["next"], 2)
        self.assertEqual([event["target"] for event in rest["events"]], ["q0"])
        self.assertIsNone(rest["next"])

    def test_all_of_it_is_json_and_nothing_is_written(self):
        self.hostile()
        before = self.store.version()
        for span in ("hour", "day"):
            json.loads(json.dumps(self.look(span)))
        for report in (
                pybgworker.queues_report(self.store, self.now),
                pybgworker.names_report(self.store, self.now),
                pybgworker.workers_report(self.store, self.app.settings, self.now),
                pybgworker.schedules_report(self.store, self.now),
                pybgworker.failures_report(self.store, self.now)):
            json.loads(json.dumps(report))
        self.assertEqual(self.store.version(), before)

    def hostile(self):
        """Rows with what nobody would call a task, and edits by hand."""
        bad = "\x1b]0;owned\x07\u202e<img src=x> \u6f22\u5b57\U0001f41f\u0301" + "n" * 150
        worker = self.worker_row(name=bad, memory=10**15, cpu=1e9)
        run = self.tasks(1, pybgworker.RUNNING, bad, bad, worker=worker, attempt=1,
                         started_at=self.now - 1000)
        self.sql("insert into bg_run values (?, ?, 1, 77, ?, null)", run, worker,
                 self.now - 10**12)
        self.sql("insert into bg_payload values (?, ?)", run * 8 + 4,
                 json.dumps([1e308, bad]))
        other = self.tasks(1, pybgworker.RUNNING, bad, bad, worker=worker, attempt=1)
        self.sql("insert into bg_payload values (?, '{')", other * 8 + 4)
        self.tasks(3, pybgworker.QUEUED, queue=bad, name=bad, due_ago=10**9)
        self.failed(bad, bad, type=bad)
        self.store.pause(bad, self.now, pybgworker.By(bad, "cli"), bad)
        self.history(0, name=bad, queue=bad, runs=10**15)
        return bad

    def test_it_costs_the_same_however_much_has_finished(self):
        self.tasks(50, pybgworker.QUEUED)
        self.tasks(20_000, pybgworker.SUCCESS, ago=3600)
        self.look()                                 # what is prepared once
        few = self.steps(self.look)
        self.tasks(60_000, pybgworker.SUCCESS, ago=3600)
        self.assertLess(self.steps(self.look), few * 1.1)

    def test_what_needs_somebody_is_found_however_much_waits(self):
        """By a leap for each queue and name that has something ready."""
        self.worker_row()
        for name in ("a", "b", "c"):
            self.tasks(100, pybgworker.QUEUED, name=name)
        facts = self.steps(lambda: self.store.system_facts(self.now))
        for name in ("a", "b", "c"):
            self.tasks(10_000, pybgworker.QUEUED, name=name)
        self.assertLess(self.steps(lambda: self.store.system_facts(self.now)),
                        facts * 1.1)


# == Screen ===================================================================


class ScreenOf:
    """A terminal, as far as `top` asks for one: what is on it after some bytes."""

    def __init__(self, width=80, height=24):
        self.width, self.height = width, height
        self.shell = self.blank()           # the screen that is there without top
        self.cells = self.shell
        self.row = self.column = 0
        self.is_other = False               # the alternate screen is shown
        self.has_cursor = True
        self.reversed = set()               # rows in which something is the other way round
        self.styles = set()                 # codes of colours and the like so far
        self.rest, self.style = "", "0"
        self.clipped = ""                   # what was written beyond an edge

    def blank(self):
        return [[" "] * self.width for _ in range(self.height)]

    def resize(self, width, height):
        self.width, self.height = width, height
        self.shell = self.blank()
        self.cells = self.blank() if self.is_other else self.shell

    def feed(self, text):
        text, self.rest = self.rest + text, ""
        part = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|[^\x1b]")
        at = 0
        while at < len(text):
            found = part.match(text, at)
            if found is None:
                self.rest = text[at:]
                assert len(self.rest) < 20, f"no terminal knows {self.rest!r}"
                return
            at = found.end()
            if found[2]:
                self.obey(found[1], found[2])
            else:
                self.put(found[0])

    def obey(self, numbers, letter):
        if (numbers, letter) in (("?1049", "h"), ("?1049", "l")):
            self.is_other = letter == "h"
            self.cells = self.blank() if self.is_other else self.shell
        elif numbers == "?25":
            self.has_cursor = letter == "h"
        elif letter == "H":
            row, column = (numbers.split(";") + ["1"])[:2] if numbers else ("1", "1")
            self.row, self.column = int(row) - 1, int(column) - 1
            if self.row >= self.height:
                self.clipped += f"line {row}"
                self.row = self.height - 1
        elif (numbers, letter) == ("2", "J"):
            self.cells[:] = self.blank()
            self.reversed.clear()
        elif (numbers, letter) == ("", "K"):
            self.cells[self.row][self.column:] = [" "] * (self.width - self.column)
            self.reversed.discard(self.row)
        elif letter == "m":
            self.style = numbers or "0"
            self.styles.add(self.style)
        else:
            raise AssertionError(f"no terminal knows {numbers!r} {letter!r}")

    def put(self, char):
        """Lines go on in the next one on the shell's screen, and end on the other."""
        if char == "\n":
            self.row += 1
            if self.row >= self.height:
                self.cells.append([" "] * self.width)
                del self.cells[0]
                self.row = self.height - 1
        elif char == "\r":
            self.column = 0
        else:
            assert char.isprintable(), f"a terminal would obey {char!r}"
            size = pybgworker.width_of(char)
            if self.column + size > self.width and not self.is_other:
                self.put("\r")
                self.put("\n")
            elif self.column + size > self.width:
                self.clipped += char
                return
            if size == 0:
                self.cells[self.row][max(0, self.column - 1)] += char
                return
            self.cells[self.row][self.column:self.column + size] = [char, *[""] * (size - 1)]
            self.column += size
            if self.style == "7":
                self.reversed.add(self.row)

    @property
    def lines(self):
        return ["".join(row).rstrip() for row in self.cells]

    @property
    def text(self):
        return "\n".join(self.lines)


class InTerminal:
    """A command of pybgworker.py in a pseudo-terminal of its own."""

    def __init__(self, case, *argv, width=80, height=24, code=None, **environment):
        import fcntl
        import pty
        import termios

        self.case, self.screen = case, ScreenOf(width, height)
        self.master, self.slave = pty.openpty()
        self.resize(width, height)
        self.mode = termios.tcgetattr(self.slave)
        self.bytes = self.unread = 0
        self.pause = threading.Event()
        self.pause.set()

        def own_terminal():
            os.setsid()
            fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

        start = ["-c", code] if code else [str(HERE / "pybgworker.py")]
        environment = {"TERM": "xterm", "LANG": "C.UTF-8", "PYTHONIOENCODING": "utf-8",
                       "TZ": "UTC", **environment}
        self.process = subprocess.Popen(
            [sys.executable, *start, *map(str, argv)], cwd=case.folder,
            env=clean_environment(PYBGWORKER_DB=str(case.db), **environment),
            stdin=self.slave, stdout=self.slave, stderr=self.slave,
            preexec_fn=own_terminal)
        self.pid = self.process.pid
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()
        case.addCleanup(self.close)

    def read(self):
        decoder = pybgworker.codecs.getincrementaldecoder("utf-8")()
        while True:
            self.pause.wait()
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            if not data:
                return
            self.bytes += len(data)
            try:
                self.screen.feed(decoder.decode(data))
            except AssertionError as exc:
                self.screen.shell = self.screen.cells = [[f"EMULATOR: {exc}"]]
                raise

    def resize(self, width, height):
        import fcntl
        import termios

        self.is_resized = hasattr(self, "mode")
        self.screen.resize(width, height)
        size = pybgworker.struct.pack("HHHH", height, width, 0, 0)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, size)

    def type(self, text):
        os.write(self.master, text.encode())

    def see(self, pattern, timeout=20):
        """Wait until the screen shows it; return the match."""
        def look():
            return re.search(pattern, self.screen.text)
        try:
            return until(look, timeout)
        except AssertionError:
            raise AssertionError(f"no {pattern!r} on\n{self.screen.text}") from None

    def see_not(self, pattern, timeout=20):
        until(lambda: not re.search(pattern, self.screen.text), timeout,
              f"the end of {pattern!r}")

    def wait(self, timeout=20):
        """Wait for its end; return its status."""
        return self.process.wait(timeout)

    def assert_restored(self):
        """The terminal is as it was: its modes, its cursor, the shell's screen."""
        import termios

        until(lambda: not self.screen.is_other, what="the shell's screen")
        self.case.assertTrue(self.screen.has_cursor)
        self.case.assertEqual(termios.tcgetattr(self.slave), self.mode)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.pause.set()
        with contextlib.suppress(OSError):      # a test has done it
            os.close(self.slave)
        self.reader.join(5)
        if not self.is_resized:
            self.case.assertEqual(self.screen.clipped, "")
        with contextlib.suppress(OSError):
            os.close(self.master)


# == Frame ====================================================================

FRAME = """\
shop.db  14:02:31 UTC   842/min  5.1 % failed   wait p95 2.4 s   7/8 busy, 2 w
× mail is paused since 13:41 by ops ("SMTP is down"): 2,311 wait, oldest 21 min
× webhooks.deliver fails 38 %: ConnectionError: api.example.org: timed out (412)
! w2 holds 1.9 GiB, 94 % of its limit, in one child: media.transcode (48102)

QUEUE         WAITING   OLDEST  RUN  IN/MIN  OUT/MIN  EMPTY IN   LAST 15 MIN
default           112   400 ms    3     402      409      16 s   ▅▆▆▅▅▅▆▇▇▆▅▅▆▆▅
mail            2,311   21 min    0     110        0    paused   ▃▃▃▃
media              41     38 s    2      12       14     3 min   ▂▁▂▂▃▂▁▂▂▂▁▂▂▃▂
webhooks        1,653     94 s    1     215      178     never   ▅▅▅▅▄▄▄▃▃▃▃▃▃▃▃

   TASK  NAME                 ON     FOR  PROGRESS                  MEM     CPU
> 48102  media.transcode      w2  13 min  62 % ██████▏···  frame  1.9 G   101 %
  48190  media.probe          w2    41 s  reading                  88 M     2 %
  48205  search.reindex       w1    12 s  18 % █▊········          61 M    96 %
  48231  billing.sync_stripe  w1   3.1 s  –                        48 M     1 %
  3 more
FAILED, LAST HOUR
   412  webhooks.deliver  ConnectionError: api.example.org: timed out   1 s ago
    11  billing.charge    KeyError: 'user_id'                         3 min ago
NEXT  billing.sync_stripe 3 s · search.reindex 2 min · reports.aggregate 57 min
q quit  ↑↓ choose  ⏎ show  w why  l logs  c cancel  r retry  p pause  ? all keys"""


def plain(lines):
    """Lines of a frame as text."""
    return ["".join(text for text, _ in line).rstrip() for line in lines]


class Frames(OverviewCase):

    def setUp(self):
        super().setUp()
        zone = os.environ.get("TZ")
        os.environ["TZ"] = "UTC"
        time.tzset()
        self.addCleanup(time.tzset)
        self.addCleanup(lambda: os.environ.pop("TZ") if zone is None
                        else os.environ.update(TZ=zone))

    def shop(self):
        """The database of FRAME, and its overview."""
        self.db = self.folder / "shop.db"
        self.app = App(db=str(self.db))
        self.store.create()
        waiting, running = pybgworker.QUEUED, pybgworker.RUNNING
        w1, w2 = (self.worker_row(name) for name in ("w1", "w2"))
        self.tasks(20_004, pybgworker.SCHEDULED, ago=9000, due_ago=-9000)
        self.tasks(2201, waiting, "mail", ago=1271)
        self.tasks(29, waiting, "media", ago=100, due_ago=38)
        self.tasks(1438, waiting, "webhooks", ago=94)
        self.failed("webhooks.deliver", "api.example.org: timed out", 1.0,
                    "ConnectionError", count=412)
        self.failed("billing.charge", "'user_id'", 184, "KeyError", count=11)
        for queue, already, more in (("default", 290, 112), ("mail", 0, 110),
                                     ("media", 0, 12), ("webhooks", 0, 215)):
            self.tasks(already, pybgworker.SUCCESS, queue, ago=30) if already else 0
            self.tasks(more, waiting, queue, ago=0.4)
        for number, name, queue, worker, ago, said, memory, used in (
            (48102, "media.transcode", "media", w2, 754, [62, "frame"], 1.9 * 2**30, 5.05),
            (48190, "media.probe", "media", w2, 41, [0, "reading"], 88 * 2**20, 0.1),
            (48205, "search.reindex", "default", w1, 12.4, [18, None], 61 * 2**20, 4.8),
            (48231, "billing.sync_stripe", "default", w1, 3.1, None, 48 * 2**20, 0.05),
            (48240, "webhooks.deliver", "webhooks", w1, 1.9, None, 0, 0),
            (48244, "billing.tax", "default", w1, 0.3, None, 0, 0),
            (48246, "search.suggest", "search", w2, 0.1, None, 0, 0),
        ):
            self.sql("""insert into bg_task (id, state, queue, name, priority, retries,
                run_at, created_at, started_at, worker, attempt)
                values (?, ?, ?, ?, 5, 3, 0, 0, ?, ?, 1)""", number, running, queue, name,
                     self.now - round(1000 * ago), worker)
            self.sql("insert into bg_run values (?, ?, 1, ?, ?, null)", number, worker,
                     number, self.now - round(1000 * ago))
            self.sql("insert into bg_child values (?, ?, 1, ?, ?)", worker, number,
                     round(memory), 10.0)
            if said:
                self.sql("insert into bg_payload values (?, ?)", number * 8 + 4,
                         json.dumps(said))
        beats = pybgworker.Beats()
        self.look(beats=beats)
        for number, used in ((48102, 5.05), (48190, 0.1), (48205, 4.8), (48231, 0.05)):
            self.sql("update bg_child set cpu = cpu + ? where pid = ?", used, number)
        self.sql("update bg_worker set beat_at = beat_at + 5000")
        self.shop_history()
        self.shop_schedules()
        view = self.look(beats=beats)
        view["attention"] = [
            {"level": level, "say": say} for level, say in (
                ("bad", 'mail is paused since 13:41 by ops ("SMTP is down"): 2,311 wait, '
                 "oldest 21 min"),
                ("bad", "webhooks.deliver fails 38 %: ConnectionError: api.example.org: "
                 "timed out (412)"),
                ("warn", "w2 holds 1.9 GiB, 94 % of its limit, in one child: "
                 "media.transcode (48102)"))]
        return view

    def shop_history(self):
        """The bars, from the first to the last; the last is 29/60 of the one before,
        and what the minute had in 31 s.
        """
        self.store.pause("mail", self.now - 1_271_000, pybgworker.By("ops", "cli"), "")
        for queue, bars, busiest, out in (
            ("default", "▅▆▆▅▅▅▆▇▇▆▅▅▆▆▅", 720, 409), ("mail", "▃▃▃▃           ", 200, 0),
            ("media", "▂▁▂▂▃▂▁▂▂▂▁▂▂▃▂", 80, 14), ("webhooks", "▅▅▅▅▄▄▄▃▃▃▃▃▃▃▃", 500, 178),
            ("search", "▅▅▅▅▅▅▅▅▅▅▅▅▅▅▅", 400, 241),
        ):
            self.history(50, queue=queue, runs=busiest)
            counts = [max(0, " ▁▂▃▄▅▆▇█".index(bar) * busiest // 8 - 5) for bar in bars]
            counts[-1] = round(out - counts[-2] * 29 / 60)
            for ago, count in zip(range(14, -1, -1), counts):
                self.history(ago, queue=queue, runs=count)
        recent = self.sql("select sum(runs) from bg_history where at > ?",
                          self.now // 1000 - 660)[0][0]
        self.history(5, name="webhooks.deliver", queue="webhooks", waited={9: 25, 10: 75},
                     exceptions=round(recent * 0.051))

    def shop_schedules(self):
        for name, seconds in (("reports.aggregate", 3449), ("billing.sync_stripe", 3),
                              ("reports.nightly", 44_849), ("search.reindex", 149)):
            self.sql("""insert into bg_schedule (task, expr, tz, number, misfire, overlap,
                jitter, next_tick, done, set_at, seen_at)
                values (?, '* * * * *', 'UTC', 0, 'latest', 'allow', 0, ?, '', 0, ?)""",
                     name, self.now // 1000 + seconds, self.now)

    def test_it_looks_as_on_the_page(self):
        view = self.shop()
        glyphs = pybgworker.Glyphs()
        lines, spots = pybgworker.frame(view, 80, 22, chosen=("task", 48102),
                                        last=glyphs.keys)
        self.assertEqual("\n".join(plain(lines)), FRAME)
        self.assertEqual([(spot.kind, spot.key) for spot in spots][3:6],
                         [("queue", "webhooks"), ("task", 48102), ("task", 48190)])
        self.assertEqual([spot.line for spot in spots],
                         [6, 7, 8, 9, 12, 13, 14, 15, 18, 19])
        styles = {text.strip(): style for line in lines for text, style in line}
        self.assertEqual((styles["paused"], styles["never"], styles["21 min"]),
                         ("bad", "warn", "bad"))
        self.assertEqual([style for text, style in lines[1]], ["bad"])
        self.assertEqual([style for text, style in lines[12]], ["chosen"])

    def test_more_lines_have_more_rows(self):
        view = self.shop()
        lines = plain(pybgworker.frame(view, 80, 60, last="q quit")[0])
        text = "\n".join(lines)
        for name in ("search ", "search.suggest", "billing.tax", "webhooks.deliver"):
            self.assertIn(name, text)
        self.assertNotIn(" more", text)
        lines = plain(pybgworker.frame(view, 80, 24, last="q quit")[0])
        self.assertEqual(len(lines), 24)
        self.assertIn("  48240  webhooks.deliver", "\n".join(lines))

    def test_more_columns_say_more(self):
        view = self.shop()
        lines = plain(pybgworker.frame(view, 130, 30)[0])
        self.assertIn("   4,117 waiting, oldest 21 min   20,004 later", lines[0])
        self.assertIn("reports.nightly 12 h", lines[-1])

    def test_a_narrow_one_has_what_matters_most(self):
        lines = plain(pybgworker.frame(self.shop(), 50, 22, last="q quit")[0])
        self.assertEqual(lines[0], "shop.db  14:02:31 UTC   842/min  5.1 % failed")
        at = lines.index("QUEUE         WAITING   OLDEST  RUN")
        self.assertEqual(lines[at + 1], "default           112   400 ms    3")
        at = lines.index("   TASK  NAME                                  FOR")
        self.assertEqual(lines[at + 1], "  48102  media.transcode                    13 min")

    def test_without_an_answer_the_time_of_the_last_one_is_said(self):
        lines = plain(pybgworker.frame(self.shop(), 80, 22,
                                       note="no answer since 14:02:31")[0])
        self.assertTrue(lines[0].startswith("shop.db  no answer since 14:02:31   842/min"))

    def test_where_nothing_happens_it_says_so(self):
        self.assertEqual(
            plain(pybgworker.frame(self.look(), 80, 22)[0]),
            ["queue.db  14:02:31 UTC   0/min  – failed   wait p95 –   no worker", "",
             "nothing waits, and nothing runs"])

    def test_letters_in_place_of_blocks(self):
        for encoding in ("ascii", "latin-1", "no-such-encoding"):
            self.assertIs(pybgworker.glyphs_of(encoding), pybgworker.PLAIN_GLYPHS)
        glyphs = pybgworker.PLAIN_GLYPHS
        lines = plain(pybgworker.frame(self.shop(), 80, 30, glyphs, last=glyphs.keys)[0])
        self.assertTrue("".join(lines).isascii(), lines)
        self.assertIn("62 % ######....  frame", "\n".join(lines))
        self.assertEqual(lines[1][:2], "x ")

    def test_no_line_is_too_wide_and_none_too_many_whatever_there_is(self):
        shop, bad = self.shop(), Overviews.hostile(self)
        views = [shop, self.look(), {**self.look(), "attention": [
            {"level": "warn", "say": bad}] * 8}]
        sizes = [(1, 1), (8, 3), (20, 6), (40, 11), (59, 20), (60, 20), (80, 24),
                 (109, 30), (110, 61), (300, 100)]
        for view, (width, height), glyphs in itertools.product(
                views, sizes, (pybgworker.Glyphs(), pybgworker.PLAIN_GLYPHS)):
            with self.subTest((width, height)):
                lines, spots = pybgworker.frame(view, width, height, glyphs,
                                                last=glyphs.keys)
                self.assertLessEqual(len(lines), height)
                for line in lines:
                    text = "".join(text for text, _ in line)
                    self.assertLessEqual(pybgworker.width_of(text), width, text)
                    self.assertNotRegex(text, "[\x00-\x1f\x7f-\x9f\u202e]")
                self.assertLessEqual({spot.line for spot in spots}, {*range(len(lines))})

    def test_columns_stay_aligned_beside_wide_characters(self):
        self.tasks(12, pybgworker.QUEUED, "\u6f22\u5b57", ago=9)
        self.tasks(345, pybgworker.QUEUED, "mail", ago=9)
        lines = plain(pybgworker.frame(self.look(), 80, 24)[0])
        at = lines.index(next(line for line in lines if line.startswith("QUEUE")))
        ends = [pybgworker.width_of(line[:line.index("9 s")])
                for line in lines[at + 1:at + 3]]
        self.assertEqual(ends[0], ends[1])

    def test_of_too_many_queues_those_with_most_tasks_are_shown(self):
        for number in range(9):
            self.tasks(1 + number % 5, pybgworker.QUEUED, f"q{number}")
        lines = plain(pybgworker.frame({**self.look(), "attention": []}, 80, 7)[0])
        self.assertEqual([line.split()[:2] for line in lines[2:]],
                         [["q2", "3"], ["q3", "4"], ["q4", "5"], ["q8", "4"],
                          ["5", "more"]])

    def test_times_and_sizes_in_few_characters(self):
        for seconds, text in (
            (None, "–"), (0, "0 ms"), (0.0004, "0 ms"), (0.4, "400 ms"), (0.9994, "999 ms"),
            (0.9996, "1 s"), (1, "1 s"), (3.14, "3.1 s"), (9.96, "10 s"), (99.4, "99 s"),
            (99.6, "2 min"), (1271, "21 min"), (5369, "89 min"), (5400, "1.5 h"),
            (44_849, "12 h"), (172_800, "2 d"), (10**12, "99999 d"),
        ):
            self.assertEqual(pybgworker.briefly(seconds), text)
            self.assertLessEqual(len(text), 7)
        for count, text in ((None, "–"), (0, "0 K"), (61 * 2**20, "61 M"),
                            (1.9 * 2**30, "1.9 G"), (1023 * 2**20, "1 G"),
                            (999 * 2**20, "999 M"), (5 * 2**40, "5 T")):
            self.assertEqual(pybgworker.bytes_briefly(count), text)

    def test_the_readme_begins_with_it(self):
        text = (HERE / "README.md").read_text(encoding="utf-8")
        self.assertIn(f"```text\n{FRAME}\n```", text.partition("\n## ")[0])


# == Top ======================================================================

TOP_TASKS = """
    import time, pathlib

    @task(name="mail.send")
    def send(to):
        return to

    @task(name="media.transcode")
    def transcode():
        current_task().set_progress(62, "frame")
        print("first line", flush=True)
        pathlib.Path("transcoding").write_text("")
        while not pathlib.Path("go").exists():
            time.sleep(0.01)
        print("last line")

    @task(name="billing.charge", retries=0)
    def charge(user):
        if pathlib.Path("mended").exists():
            return "charged"
        raise KeyError("user_id")
"""


class Tops(Served):
    """`top` in a pseudo-terminal, with real workers where one is needed."""

    TASKS = TOP_TASKS

    def top(self, *flags, **options):
        self.store.create()
        top = InTerminal(self, "top", "--interval", "0.1", *flags, **options)
        top.see("/min")
        return top

    def enqueued(self):
        """A task that waits in queue mail."""
        return self.tasks.send.options(queue="mail").delay("ann").id

    def failing(self, count=2):
        results = [self.tasks.charge.delay(n) for n in range(count)]
        worker = self.worker("--concurrency", 1)
        for result in results:
            self.failure(result)
        return worker

    def transcoding(self):
        """(a worker that runs media.transcode, the task's id)"""
        result = self.tasks.transcode.delay()
        worker = self.worker("--concurrency", 1, "--worker-name", "w1")
        until(lambda: (self.folder / "transcoding").exists(), what="its start")
        return worker, result.id

    def test_it_shows_what_happens_and_q_gives_the_terminal_back(self):
        _, task = self.transcoding()
        self.enqueued()
        top = self.top()
        self.assertTrue(top.screen.is_other)
        self.assertFalse(top.screen.has_cursor)
        top.see(rf"(?m)^> +{task}  media.transcode +w1 +\S+ m?s  62 % ██████▏···  frame")
        top.see(r"(?m)^mail +1 .* RUN|^mail +1 ")
        top.see("(?m)^q quit  ↑↓ choose")
        self.assertEqual(top.screen.lines[0].split()[0], "queue.db")
        (self.folder / "go").write_text("")
        top.see_not("media.transcode")
        top.type("q")
        self.assertEqual(top.wait(), 0)
        top.assert_restored()
        self.assertEqual(top.screen.text.strip(), "")      # the shell's screen

    def test_ctrl_c_and_signals_give_the_terminal_back(self):
        for act, status in (
            (lambda top: top.type("\x03"), 130),
            (lambda top: top.process.terminate(), 128 + signal.SIGTERM),
            (lambda top: top.process.send_signal(signal.SIGHUP), 128 + signal.SIGHUP),
            (lambda top: top.type("\x1c"), 128 + signal.SIGQUIT),
        ):
            with self.subTest(status):
                top = self.top()
                act(top)
                self.assertEqual(top.wait(), status)
                top.assert_restored()

    def test_a_crash_gives_the_terminal_back(self):
        self.store.create()
        top = InTerminal(self, "top", "--interval", "0.1", code="""if 1:
            import pybgworker
            looks = []
            real = pybgworker.overview
            def overview(*args, **kwargs):
                looks.append(1)
                if len(looks) > 3:
                    raise ZeroDivisionError("a defect")
                return real(*args, **kwargs)
            pybgworker.overview = overview
            pybgworker.main()""")
        self.assertEqual(top.wait(), 1)
        top.see("ZeroDivisionError: a defect")
        top.assert_restored()

    SHELL = """if 1:
        import os, signal, sys
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.tcsetpgrp(0, os.getpid())
            signal.signal(signal.SIGTTOU, signal.SIG_DFL)
            os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
        print(f"job {pid}.", flush=True)
        sys.exit(os.WEXITSTATUS(os.waitpid(pid, 0)[1]))"""

    def test_ctrl_z_stops_it_and_fg_goes_on(self):
        """Below a shell: nobody can stop what no shell could wake."""
        self.store.create()
        top = InTerminal(self, HERE / "pybgworker.py", "top", "--interval", "0.1",
                         code=self.SHELL)
        pid = int(top.see(r"job (\d+)\.")[1])
        top.see("/min")
        top.type("\x1a")
        until(lambda: self.state_of(pid) == "T", what="a stop")
        top.assert_restored()
        self.enqueued()
        os.kill(pid, signal.SIGCONT)
        top.see("(?m)^mail +1")
        self.assertTrue(top.screen.is_other)
        top.type("q")
        self.assertEqual(top.wait(), 0)
        top.assert_restored()

    def test_after_a_stop_that_it_could_not_see_all_is_drawn_anew(self):
        top = self.top()
        os.kill(top.pid, signal.SIGSTOP)
        until(lambda: self.state_of(top.pid) == "T", what="a stop")
        top.screen.cells[:] = top.screen.blank()        # the shell has been there
        os.kill(top.pid, signal.SIGCONT)
        top.see("/min")

    def state_of(self, pid):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

    def test_it_fills_the_terminal_whatever_its_size_becomes(self):
        self.enqueued()
        top = self.top()
        for width, height in ((120, 60), (50, 12), (80, 24), (20, 3)):
            top.resize(width, height)
            until(lambda: top.screen.lines[0].startswith("queue.db")
                  and top.screen.lines[-1].startswith("q quit"), what="all of it")
        top.resize(60, 24)
        top.see("EMPTY IN|OUT/MIN")
        top.resize(59, 24)
        top.see_not("OUT/MIN")
        top.see("WAITING +OLDEST +RUN")

    def test_only_lines_that_have_changed_are_written(self):
        self.store.create()
        self.fill(8, queue="'mail'")            # due since 1970: that age is the same
        top = self.top()
        top.see("(?m)^mail +8")
        clock = top.screen.lines[0]
        until(lambda: top.screen.lines[0] != clock, what="the next second")
        before, clock = top.bytes, top.screen.lines[0]
        until(lambda: top.screen.lines[0] != clock, what="the next second")
        # The line of the clock: 80 characters, and what says where and how.
        self.assertLess(top.bytes - before, 80 + 60)

    def test_a_terminal_that_does_not_read_only_delays_it(self):
        top = self.top()
        top.pause.clear()               # nobody reads
        for _ in range(60):
            top.resize(200, 60)
            top.resize(80, 24)
        self.enqueued()
        top.pause.set()
        top.see("(?m)^mail +1")
        top.type("q")
        self.assertEqual(top.wait(), 0)

    def test_a_terminal_that_is_closed_ends_it(self):
        top = self.top()
        os.close(top.slave)
        os.close(top.master)
        self.assertIn(top.wait(), (0, 128 + signal.SIGHUP))

    def test_rows_are_chosen_with_arrows(self):
        self.failing(1).stop()
        self.enqueued()
        top = self.top()
        top.see("billing.charge")

        def chosen():
            return [top.screen.lines[row] for row in sorted(top.screen.reversed)]

        until(lambda: len(chosen()) == 1 and chosen()[0].startswith("mail"),
              what="the queue")
        top.type("\x1b[B")
        until(lambda: len(chosen()) == 1 and "billing.charge" in chosen()[0],
              what="the failure")
        self.assertTrue(chosen()[0].startswith(">"))
        top.type("\x1b[B\x1bOB")
        top.type("k")
        until(lambda: len(chosen()) == 1 and chosen()[0].startswith("mail"),
              what="the queue again")

    def test_a_task_is_shown_explained_and_its_output_followed(self):
        _, task = self.transcoding()
        top = self.top()
        top.see("> .*media.transcode")
        top.type("\r")
        top.see(f"(?m)^task {task}$")
        top.see("(?m)^status +running")
        top.type("w")
        top.see(f"(?m)^why {task}$")
        top.see("It has been running on w1 for ")
        top.type("l")
        top.see(f"(?m)^logs {task}$")
        top.see("first line")
        (self.folder / "go").write_text("")
        top.see("last line")
        top.type("q")
        top.see("/min")
        self.assertIsNone(top.process.poll())

    def test_a_page_is_moved_through(self):
        task = self.tasks.charge.delay(list(range(200))).id
        self.enqueued()
        top = self.top(height=10)
        top.type("?")
        top.see("all keys")
        top.see("q +quit")
        top.type("\x1b[6~")
        top.see_not("q +quit")
        top.type("\x1b[H")
        top.see("q +quit")
        top.type("G")
        top.see("busiest minute of this hour")
        top.type("\x1b")
        top.see("/min")
        self.assertTrue(task)

    def test_a_running_task_is_cancelled_after_a_y(self):
        worker, task = self.transcoding()
        top = self.top()
        top.see("> .*media.transcode")
        top.type("c")
        top.see(rf"(?m)^cancel {task} media.transcode\? y/N$")
        top.type("n")
        top.see("nothing was changed")
        self.assertEqual(self.store.task(task).cancel_asked, 0)
        top.type("c")
        top.see(r"y/N")
        top.type("y")
        top.see(f"task {task} is being ended")
        until(lambda: self.store.task(task).status == "cancelled", what="its end")
        event = self.store.events()[0]
        self.assertEqual((event.action, event.target, event.how),
                         ("cancel", str(task), "cli"))
        self.assertTrue(event.who)

    def test_a_group_that_failed_is_retried(self):
        self.failing(3)
        top = self.top()
        top.see("3  billing.charge")
        (self.folder / "mended").write_text("")
        top.type("r")
        top.see(r"(?m)^retry 3 failed billing.charge\? y/N$")
        top.type("y")
        top.see("3 of 3 are queued again")
        until(lambda: self.sql("select count(*) from bg_task where state = 4")[0][0] == 3,
              what="success")
        top.see_not("billing.charge")

    def test_a_queue_is_paused_and_resumed(self):
        self.enqueued()
        top = self.top()
        top.see("mail")
        top.type("p")
        top.see(r"(?m)^pause mail\? y/N$")
        top.type("y")
        top.see("queue mail is paused")
        top.see("(?m)^mail .* paused")
        self.assertEqual(self.store.paused_queues(), ["mail"])
        top.type("p")
        top.see(r"(?m)^resume mail\? y/N$")
        top.type("y")
        top.see("queue mail goes on")
        self.assertEqual(self.store.paused_queues(), [])
        self.assertEqual([event.action for event in self.store.events()],
                         ["resume", "pause"])

    def test_what_a_key_cannot_do_is_said(self):
        task = self.enqueued()
        top = self.top()
        for key, said in (("c", "choose a task for that"), ("r", "choose a task")):
            top.type(key)
            top.see(said)
        top.type("w")
        top.see("(?m)^what needs you$")
        top.see("(?i)no worker")
        top.type("q")
        top.type("\r")
        top.see("(?m)^queue mail: its newest tasks")
        top.see(rf"(?m)^ *{task}  queued  mail.send")
        top.type("c")
        top.see("choose a task for that")
        top.type("q")
        top.see("/min")

    def test_read_only_changes_nothing(self):
        _, task = self.transcoding()
        top = self.top("--read-only")
        top.see("> .*media.transcode")
        self.assertNotIn("cancel", top.screen.lines[-1])
        for key in "crp":
            top.type(key)
            top.see("nothing can be changed here: --read-only|is running")
            top.type("y")
        top.type("w")
        top.see(f"why {task}")
        self.assertEqual(self.store.events(), [])
        self.assertEqual(self.status(task), "running")

    def status(self, task):
        return self.store.task(task).status

    def test_while_the_database_does_not_answer_the_last_frame_stays(self):
        self.enqueued()
        top = self.top()
        top.see("(?m)^mail +1")
        away = self.folder / "away.db"
        self.db.rename(away)
        top.see(r"(?m)^queue.db  no answer since \d\d:\d\d:\d\d ")
        top.see("(?m)^mail +1")
        top.type("?")                   # keys do what they can
        top.see("all keys   no answer since")
        top.type("q")
        top.see("(?m)^database .*queue.db")
        away.rename(self.db)
        top.see(r"(?m)^queue.db  \d\d:\d\d:\d\d UTC")
        top.type("q")
        self.assertEqual(top.wait(), 0)

    def test_hostile_names_stay_in_their_columns(self):
        bad = "\x1b]0;owned\x07\u202e\u6f22\u5b57\U0001f41f x\u0301"
        self.app.send(bad, queue=bad)
        self.tasks.send.options(queue="mail").delay("ann")
        self.store.pause(bad, self.store.now())
        top = self.top(width=100)
        top.see("(?m)^mail +1 ")
        top.see("paused")
        cells = top.screen.cells
        head = next(line for line in cells if line[0:5] == list("QUEUE"))
        mail = next(line for line in cells if line[0:4] == list("mail"))
        row = next(line for line in cells[cells.index(head):] if "漢" in line)
        end = "".join(head).index("WAITING") + 7
        for line in (row, mail):
            self.assertEqual("".join(line[end - 2:end]), " 1")
        self.assertIn("\\x1b]0;owned", "".join(row))

    def test_without_colours_there_are_none(self):
        self.enqueued()
        self.store.pause("mail", self.store.now())
        top = self.top(NO_COLOR="1")
        top.see("paused")
        self.assertLessEqual(top.screen.styles, {"0", "1", "2", "7"})
        top = self.top()
        top.see("paused")
        until(lambda: "31" in top.screen.styles, what="red")

    def test_a_terminal_that_has_no_blocks_gets_letters(self):
        self.transcoding()
        top = self.top(PYTHONIOENCODING="ascii")
        top.see("62 % ######[.]{4}  frame")
        top.see("up/down")
        self.assertTrue(top.screen.text.isascii())

    def test_once_prints_one_plain_frame(self):
        self.enqueued()
        done = self.cli("top", "--once", PYTHONIOENCODING="utf-8")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        lines = done.stdout.splitlines()
        self.assertRegex(lines[0], "^queue.db  .* 0/min  – failed")
        self.assertNotIn("\x1b", done.stdout)
        self.assertNotIn("q quit", done.stdout)
        self.assertRegex(done.stdout, "(?m)^mail +1 ")
        self.assertEqual(self.cli("top", PYTHONIOENCODING="utf-8").returncode, 0)
        top = InTerminal(self, "top", "--once")         # also on a terminal
        self.assertEqual(top.wait(), 0)
        top.see("(?m)^mail +1")
        self.assertFalse(top.screen.is_other)

    def test_once_on_a_terminal_that_obeys_nothing(self):
        self.store.create()
        top = InTerminal(self, "top", TERM="dumb")
        self.assertEqual(top.wait(), 0)
        self.assertFalse(top.screen.is_other)

    def test_json_is_the_overview(self):
        self.enqueued()
        done = self.cli("top", "--json")
        view = json.loads(done.stdout)
        self.assertEqual(view["figures"]["waiting"], 1)
        self.assertEqual(view.keys(), pybgworker.overview(
            self.store, self.app.settings, self.store.now()).keys())

    def test_what_cannot_be_said_is_said_in_one_line(self):
        done = self.cli("top")
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count("\n"), 1)
        self.assertFalse(self.db.exists())
        for interval in ("0", "x", "4000"):
            done = self.cli("top", "--interval", interval)
            self.assertEqual(done.returncode, 2)
            self.assertIn("seconds from 0.1 to 3,600", done.stderr)

    def test_it_waits_no_longer_for_a_look_than_a_twentieth_of_its_time(self):
        """The pause grows with what a look costs."""
        screen = mock.Mock(encoding="utf-8", colour=False)
        clock = [0.0]
        waits = []

        def keys(seconds):
            waits.append(seconds)
            clock[0] += seconds
            return ["q"] if len(waits) == 2 else []

        screen.keys, screen.size = keys, lambda: (80, 24)
        top = pybgworker.Top(self.app, screen, 2.0, False)
        top.view = pybgworker.overview(self.store, self.app.settings, self.store.now())
        costs = iter((0.01, 0.5))
        top.look = lambda: clock.__setitem__(0, clock[0] + next(costs))
        with mock.patch.object(pybgworker.time, "monotonic", lambda: clock[0]):
            self.assertEqual(top.run(), 0)
        self.assertEqual([round(wait, 2) for wait in waits], [1.99, 9.5])


# == Metrics ==================================================================


class ParseError(Exception):
    pass


def parse_metrics(text):
    """The families of a page, by the grammar of text format 0.0.4 and no other.

    {name: (type, help, {((label, value), …): value})}; of a histogram with the
    suffixes of its samples as a label of their own.
    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    if text[-1:] != "\n":
        raise ParseError("the last line must end with a line feed")
    families, name = {}, None
    for number, line in enumerate(text[:-1].split("\n"), 1):
        try:
            if line.startswith("#"):
                name = _parse_comment(line, families, name)
            else:
                _parse_sample(line, families, name)
        except ParseError as exc:
            raise ParseError(f"line {number}, {line!r}: {exc}") from None
    for name, (kind, _, samples) in families.items():
        if kind == "histogram":
            _check_histogram(name, samples)
    return families


def _parse_comment(line, families, name):
    found = re.fullmatch(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*) (.*)", line)
    if not found:
        raise ParseError("no HELP, no TYPE")
    what, name, rest = found.groups()
    if what == "HELP":
        if name in families:
            raise ParseError("a second HELP, or one after its samples")
        if re.search(r"\\(?![\\n])", rest):
            raise ParseError("no such escape in a HELP")
        families[name] = ("", rest, {})
    else:
        if name not in families or families[name][0] or families[name][2]:
            raise ParseError("a second TYPE, one without HELP, or one after its samples")
        if rest not in ("counter", "gauge", "histogram", "summary", "untyped"):
            raise ParseError("no such type")
        families[name] = (rest, *families[name][1:])
    return name


def _parse_sample(line, families, name):
    found = re.match(r"[a-zA-Z_:][a-zA-Z0-9_:]*", line)
    if not found:
        raise ParseError("no name")
    metric, rest, labels = found[0], line[found.end():], []
    if rest.startswith("{"):
        rest = rest[1:]
        while not rest.startswith("}"):
            found = re.match(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\[\\"n])*)"', rest)
            if not found:
                raise ParseError("no label")
            value = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), found[2])
            labels.append((found[1], value))
            rest = rest[found.end():]
            if rest[:1] == ",":
                rest = rest[1:]
            elif rest[:1] != "}":
                raise ParseError("neither , nor }")
        rest = rest[1:]
    if not re.fullmatch(r" ([-+]?(\d+(\.\d*)?([eE][-+]?\d+)?|Inf)|NaN)", rest):
        raise ParseError("no value")
    if len(dict(labels)) != len(labels):
        raise ParseError("a label twice")
    kind = families.get(name, ("",))[0]
    suffix = metric[len(name):] if name and metric.startswith(name) else None
    allowed = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
    if not kind or suffix not in allowed:
        raise ParseError("not of the family before it")
    labels += [("", suffix)] if suffix else []
    if tuple(labels) in families[name][2]:
        raise ParseError("the same series twice")
    families[name][2][tuple(labels)] = float(rest)


def _check_histogram(name, samples):
    groups = collections.defaultdict(lambda: {"_bucket": [], "_sum": [], "_count": []})
    for labels, value in samples.items():
        of = {k: v for k, v in labels}
        suffix, le = of.pop(""), of.pop("le", None)
        groups[tuple(of.items())][suffix].append((le, value))
    for labels, found in groups.items():
        bounds = [float(le) for le, _ in found["_bucket"]]
        counts = [value for _, value in found["_bucket"]]
        if bounds != sorted(set(bounds)) or bounds[-1] != math.inf:
            raise ParseError(f"{name} {labels}: buckets up to {bounds}")
        if counts != sorted(counts) or [(None, counts[-1])] != found["_count"] \
                or len(found["_sum"]) != 1:
            raise ParseError(f"{name} {labels}: {found}")


def promtool(case, *argv, stdin=""):
    """Run it; skip the test where there is none."""
    path = shutil.which("promtool")
    if not path:
        case.skipTest("no promtool: it comes with Prometheus")
    done = subprocess.run([path, *map(str, argv)], input=stdin, text=True, timeout=60,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


class MetricsPages(QueueCase):

    HISTORY = {
        "task_runs_total": ("counter", "task queue outcome",
                            "Runs that ended, by how; a run that is retried counts as "
                            "retried."),
        "task_errors_total": ("counter", "task queue kind",
                              "Runs that ended badly, by kind."),
        "task_duration_seconds": ("histogram", "task queue",
                                  "Seconds a run took in the child."),
        "task_wait_seconds": ("histogram", "task queue", "Seconds from due to begun."),
    }
    OTHERS = {
        "info": ("gauge", "version schema",
                 "Version of the program that answers, and of the schema."),
        "queue_tasks": ("gauge", "queue state", "Unfinished tasks."),
        "queue_oldest_seconds": ("gauge", "queue",
                                 "Seconds since the oldest task that may run became due; "
                                 "0: none waits."),
        "queue_paused": ("gauge", "queue", "1 while paused."),
        "workers": ("gauge", "state", "Registered workers."),
        "worker_children": ("gauge", "state", "Children of live workers."),
        "worker_heartbeat_age_seconds": ("gauge", "", "Age of the oldest heartbeat of a "
                                         "registered worker."),
        "worker_memory_bytes": ("gauge", "part", "Resident memory of live workers and of "
                                "their children, summed."),
        "worker_cpu_seconds_total": ("counter", "part", "CPU time of workers and of their "
                                     "children, summed; also of those that left."),
        "schedule_last_success_timestamp_seconds": ("gauge", "schedule", "Unix time; 0 "
                                                    "before the first."),
        "schedule_next_timestamp_seconds": ("gauge", "schedule",
                                            "Unix time of the next tick."),
        "last_task_id": ("gauge", "", "Highest id given: its rate is the enqueue rate."),
        "database_size_bytes": ("gauge", "file", "Size of the files."),
        "database_free_bytes": ("gauge", "", "Bytes in the main file that are used before "
                                "it grows."),
        "history_age_seconds": ("gauge", "", "Age of the newest flushed history of a live "
                                "worker."),
    }

    def setUp(self):
        super().setUp()
        self.counts = pybgworker.RunCounts()

    def page(self, now=None):
        return pybgworker.metrics_text(
            self.store, self.app.settings, now or self.now)

    def parsed(self, now=None):
        """{name without its prefix: {labels: value}}."""
        page = parse_metrics(self.page(now))
        return {name.replace("pybgworker_", ""): samples
                for name, (_, _, samples) in page.items()}

    def value(self, name, now=None, **labels):
        return self.parsed(now)[name].get(tuple(labels.items()))

    def end(self, name="t", queue="default", count=1, duration=0.01, waited=0,
            state=pybgworker.SUCCESS, **error):
        """Runs that ended, and are counted."""
        self.enqueue(name, queue, count=count)
        runs = self.claim(names=[name], queues=[queue], free=count)
        self.assertEqual(len(runs), count)
        self.turn(history=self.counts, outcomes=[
            Outcome(run, state, started_at=run.run_at + waited, duration=duration,
                    error=error or None) for run in runs])

    def schedule(self, task="nightly", expr="0 3 * * *", **values):
        row = pybgworker.ScheduleRow(task, expr, "UTC", 0, "latest", "allow", 0.0,
                                     None, None, "[]", self.now, self.now)
        self.store.put_schedules([row])
        for column, value in values.items():
            self.sql(f"update bg_schedule set {column} = ? where task = ? and expr = ?",
                     value, task, expr)

    def full(self):
        """Something of everything."""
        self.end()
        self.end("we\"ird\\na\nme", "q\\\"\n", state=pybgworker.FAILED,
                 kind="exception", type="KeyError")
        self.enqueue("waits", "mail")
        self.store.pause("mail", self.now)
        self.schedule(next_tick=self.now // 1000 + 60)

    def test_names_types_labels_and_help_are_those_of_the_contract(self):
        self.full()
        found = parse_metrics(self.page())
        wanted = {**self.HISTORY, **self.OTHERS}
        self.assertEqual({name.replace("pybgworker_", "") for name in found}, {*wanted})
        for name, (kind, labels, meaning) in wanted.items():
            with self.subTest(name):
                got_kind, got_help, samples = found["pybgworker_" + name]
                self.assertEqual((got_kind, got_help), (kind, meaning))
                self.assertTrue(samples)
                for series in samples:
                    names = [label for label, _ in series if label not in ("", "le")]
                    self.assertEqual(names, labels.split())

    def test_an_empty_queue_has_a_page_too(self):
        self.sql("delete from bg_worker")
        found = parse_metrics(self.page())
        self.assertEqual(found["pybgworker_worker_heartbeat_age_seconds"][2], {})
        self.assertEqual(self.value("last_task_id"), 0)

    def test_the_readme_lists_them_all(self):
        text = (HERE / "README.md").read_text(encoding="utf-8")
        for name, (kind, labels, meaning) in {**self.HISTORY, **self.OTHERS}.items():
            labels = ", ".join(f"`{label}`" for label in labels.split())
            self.assertIn(f"| `pybgworker_{name}` | {kind} | {labels} | {meaning} |", text)

    def rules(self):
        """The file of the README's alert rules."""
        text = (HERE / "README.md").read_text(encoding="utf-8")
        path = self.folder / "rules.yml"
        path.write_text(re.search(r"(?ms)^```yml\n(groups:.*?)^```", text)[1])
        return path

    def test_promtool_finds_no_fault_in_the_rules(self):
        code, said = promtool(self, "check", "rules", self.rules())
        self.assertEqual(code, 0, said)
        self.assertIn("4 rules found", said)

    def input_series(self, before, after):
        """Two pages as what a minute's scrapes would see: counters go on growing."""
        old, found = parse_metrics(before), []
        for name, (kind, _, samples) in parse_metrics(after).items():
            for labels, value in samples.items():
                if kind == "histogram":
                    continue
                text = ",".join(f"{key}={json.dumps(text)}" for key, text in labels)
                step = value - old[name][2].get(labels, 0) if kind == "counter" else 0
                found.append({"series": f"{name}{{{text}}}",
                              "values": f"{value:.15g}+{step:.15g}x30"})
        return found

    def alerts(self, series, alert, at="20m"):
        """The labels with which an alert fires after so long, by promtool."""
        test = self.folder / "test.yml"
        test.write_text(json.dumps({        # which is YAML, too
            "rule_files": [str(self.rules())], "evaluation_interval": "1m",
            "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": [
                {"eval_time": at, "alertname": alert, "exp_alerts": []}]}]}))
        code, said = promtool(self, "test", "rules", test)
        return [dict(re.findall(r'(\w+)="([^"]*)"', labels))
                for labels in re.findall(r"Labels:\{(.*?)\}", said.partition("got:")[2])] \
            if code else []

    def test_each_alert_fires_on_what_it_is_about_and_on_nothing_else(self):
        self.sql("update bg_worker set beat_at = ?, concurrency = 1", self.now)
        self.schedule(next_tick=self.now // 1000 + 3600)
        self.end("good", "calm", count=5)
        self.end("bad", "calm", count=5)
        before = self.page()
        self.end("good", "calm", count=10)
        self.end("bad", "calm", count=10)
        names = ("QueueStuck", "TaskFailing", "NoWorker", "ScheduleLate")
        well = self.input_series(before, self.page())
        for alert in names:
            self.assertEqual(self.alerts(well, alert), [], alert)

        self.end("bad", "calm", count=5, state=pybgworker.FAILED, kind="crash")
        self.enqueue("t", "stuck")
        self.enqueue("t", "paused")
        self.sql("update bg_task set run_at = ? where queue in ('stuck', 'paused')",
                 self.now - 301_000)
        self.store.pause("paused", self.now)
        self.sql("update bg_worker set beat_at = 1")
        self.sql("update bg_schedule set next_tick = 60")       # the test begins at 0
        ill = self.input_series(before, self.page())
        for alert, labels in zip(names, ({"queue": "stuck"}, {"task": "bad"},
                                         {"state": "live"}, {"schedule": "nightly"})):
            with self.subTest(alert):
                found, = self.alerts(ill, alert)
                self.assertEqual(found, {"alertname": alert, **labels})

    def test_promtool_finds_no_fault(self):
        self.full()
        self.assertEqual(promtool(self, "check", "metrics", stdin=self.page()), (0, ""))
        code, _ = promtool(self, "check", "metrics", stdin="a 1\na 1\n")    # it can tell
        self.assertNotEqual(code, 0)

    def test_the_parser_of_these_tests_is_strict(self):
        head = "# HELP a b\n# TYPE a gauge\n"
        parse_metrics(head + 'a{b="c\\n"} 1\n')
        for bad in ('a{b="c\n"} 1\n', 'a{b="\\x"} 1\n', 'a{b="c} 1\n', "a 1", "a  1\n",
                    "a 0x1\n", "a 1\na 1\n", "b 1\n", 'a{b="c" d="e"} 1\n', "\n",
                    "a 1\n# TYPE a gauge\n", 'a{b="1",b="2"} 1\n', "a 1 \n"):
            with self.subTest(bad), self.assertRaises(ParseError):
                parse_metrics(head + bad)

    def test_a_label_is_whatever_a_name_is(self):
        names = ["a\\b", 'a"b', "a\nb", "a\\nb", "a{b}", "ü€\U0001f600", " ", "a\x01b",
                 "a\u2028b", "a,b=\"c\"", "a\rb"]
        for name in names:
            self.end(name)
        found = {dict(labels)["task"] for labels in self.parsed()["task_runs_total"]}
        self.assertEqual(found, {*names})
        row = pybgworker.HistoryRow(0, 0, "a\udc80b", "q", runs=3)
        with mock.patch.object(self.store, "totals", lambda: [row]):
            page = self.page()
        page.encode()
        self.assertIn('task="a\\\\udc80b",queue="q",outcome="success"} 3', page)

    def test_outcomes_and_kinds_are_counted(self):
        self.end(count=3)
        for kind in ("exception", "timeout", "crash", "abort"):
            self.end(state=pybgworker.FAILED, kind=kind)
        self.end(state=pybgworker.CANCELLED)
        found = self.parsed()
        runs, errors = (
            {labels[-1][1]: value for labels, value in found[name].items()}
            for name in ("task_runs_total", "task_errors_total"))
        self.assertEqual(runs, {"success": 3, "failed": 4, "retried": 0, "cancelled": 1})
        self.assertEqual(errors, {"exception": 1, "timeout": 1, "crash": 1, "lost": 0,
                                  "abort": 1})

    def test_buckets_are_sums_up_to_their_bound(self):
        chance = random.Random(5)
        values = [0, .005, .0051, .1, 1, 1000, 1000.5, 20_000,
                  *(10 ** chance.uniform(-4, 4.2) for _ in range(300))]
        for value in values:
            self.end(duration=value, waited=round(value * 1000))
        found = self.parsed()
        for name, got in (("duration", values),
                          ("wait", [round(v * 1000) / 1000 for v in values])):
            samples = {labels[2:]: value for labels, value
                       in found[f"task_{name}_seconds"].items()}
            for bound in (.005, .025, .1, .25, .5, 1, 2.5, 5, 10, 25, 100, 250, 1000,
                          math.inf):
                le = "+Inf" if bound == math.inf else str(float(bound))
                with self.subTest(name, le=le):
                    self.assertEqual(samples[("le", le), ("", "_bucket")],
                                     sum(value <= bound for value in got))
            self.assertEqual(len(samples), 14 + 2)
            self.assertAlmostEqual(samples[("", "_sum"),], sum(got), delta=0.2)

    def rows(self, count, **more):
        return [pybgworker.HistoryRow(0, 0, f"t{n}", f"q{n % 7}", lo=n, runs=1000 - n,
                                      failed=n % 3, **more) for n in range(count)]

    def runs(self, rows):
        with mock.patch.object(self.store, "totals", lambda: rows):
            return self.parsed()["task_runs_total"]

    def test_two_hundred_pairs_are_told_apart_and_the_rest_is_other(self):
        rows = self.rows(200)
        self.assertEqual(len(self.runs(rows)), 800)
        self.assertNotIn("other", {labels[0][1] for labels in self.runs(rows)})
        rows = self.rows(900)
        found = self.runs(rows)
        self.assertEqual(len(found), 800)
        self.assertEqual(sum(found.values()), sum(row.runs for row in rows))
        other = {labels[2][1]: value for labels, value in found.items()
                 if labels[:2] == (("task", "other"), ("queue", "other"))}
        self.assertEqual(sum(other.values()), sum(row.runs for row in rows[199:]))
        self.assertEqual(other["failed"], sum(row.failed for row in rows[199:]))

    def test_a_task_that_is_named_other_is_in_the_sum_of_the_others(self):
        rows = [row._replace(runs=9) for row in self.rows(300)]
        rows[0] = rows[0]._replace(name="other", queue="other", runs=10**6)
        found = self.runs(rows)
        self.assertEqual(sum(found.values()), sum(row.runs for row in rows))

    def test_those_that_run_about_as_often_do_not_change_places(self):
        rows = [row._replace(runs=5000) for row in self.rows(300)]
        before = [labels for labels in self.runs(rows)]
        rows[250:] = [row._replace(runs=7000) for row in rows[250:]]
        self.assertEqual([labels for labels in self.runs(rows)], before)
        rows[299] = rows[299]._replace(runs=10**6)
        self.assertIn((("task", "t299"), ("queue", "q5"), ("outcome", "success")),
                      self.runs(rows))

    def counters(self, now):
        page = parse_metrics(self.page(now))
        return {(name, labels): value for name, (kind, _, samples) in page.items()
                for labels, value in samples.items()
                if kind in ("counter", "histogram")}

    def test_counters_never_go_back(self):
        """Whatever is done to a queue between two looks: 4 programs of 60 steps."""
        for seed in range(4):
            chance, before = random.Random(seed), {}
            self.setUp()
            for step in range(60):
                what = chance.choice(["end", "end", "end", "fail", "roll", "prune",
                                      "restart", "leave", "later"])
                if what in ("end", "fail"):
                    self.end(chance.choice("abc"), chance.choice("pq"), count=2,
                             duration=chance.uniform(0, 9),
                             **({} if what == "end" else {
                                 "state": pybgworker.FAILED, "kind": "crash"}))
                elif what == "roll":
                    while self.store.roll_up(self.now):
                        pass
                elif what == "prune":
                    self.store.prune(0, self.now + 1, self.now + 1, 1000)
                elif what == "restart":
                    self.app.store.close()
                    self.app = App(db=str(self.db))
                    self.counts = pybgworker.RunCounts()
                elif what == "leave":
                    self.sql("update bg_worker set cpu = ifnull(cpu, 0) + 1.5 "
                             "where id = 2")
                    self.store.remove_worker(2)
                    add_workers(self.store, 2)
                else:
                    self.now += chance.choice([1000, 10**6, 10**8])
                found = self.counters(self.now)
                for series, value in before.items():
                    self.assertGreaterEqual(found.get(series, -1), value,
                                            f"seed {seed}, step {step}: {what} {series}")
                before = found

    def test_queues_tell_what_waits_for_how_long_and_whether_they_are_paused(self):
        self.enqueue("a", "mail", count=3)
        self.enqueue("a", "mail", at=self.now + 10_000)
        self.store.pause("mail", self.now)
        self.store.pause("empty", self.now)
        later = self.now + 7000
        self.assertEqual(self.value("queue_tasks", queue="mail", state="queued"), 3)
        self.assertEqual(self.value("queue_tasks", queue="mail", state="scheduled"), 1)
        self.assertEqual(self.value("queue_oldest_seconds", later, queue="mail"), 7)
        self.assertEqual(self.value("queue_oldest_seconds", queue="empty"), 0)
        self.assertEqual(self.value("queue_paused", queue="empty"), 1)

    def test_of_many_queues_those_are_told_apart_that_wait_longest(self):
        self.fill(1000, queue="'q' || i")
        self.sql("update bg_task set run_at = ? + id", self.now - 10_000)
        self.store.pause("q999", self.now)
        found = self.parsed()
        tasks = found["queue_tasks"]
        self.assertEqual(len(tasks), 800)
        self.assertEqual(sum(tasks.values()), 1000)
        self.assertEqual(tasks[("queue", "q1"), ("state", "queued")], 1)
        self.assertEqual(found["queue_paused"][("queue", "q999"),], 1)
        self.assertEqual(tasks[("queue", "other"), ("state", "queued")], 801)

    def test_workers_are_live_dead_starting_or_stopping(self):
        add_workers(self.store, *range(3, 8))
        pybgworker.LiveFile.of(f"{self.store.path}-live")
        self.sql("update bg_worker set beat_at = ?, concurrency = 4, memory = 10, "
                 "cpu = 2, children_cpu = 30", self.now)
        self.sql("update bg_worker set state = 'starting' where id = 3")
        self.sql("update bg_worker set state = 'stopping' where id = 4")
        self.sql("update bg_worker set beat_at = ? where id = 5", self.now - 15_001)
        self.sql("update bg_worker set host = ?, boot = 'before' where id = 6",
                 socket.gethostname())
        self.sql("insert into bg_child values (1, 11, 2, 100, 0), (1, 12, 0, 100, 0), "
                 "(5, 13, 1, 100, 0)")
        found = self.parsed()
        dead = 2 if pybgworker.boot_id() else 1
        states = {labels[0][1]: value for labels, value in found["workers"].items()}
        self.assertEqual(states, {"live": 5 - dead, "dead": dead, "starting": 1,
                                  "stopping": 1})
        self.assertEqual(self.value("worker_children", state="busy"), 1)
        self.assertEqual(self.value("worker_children", state="idle"),
                         4 * (7 - dead) - 1)
        self.assertEqual(self.value("worker_memory_bytes", part="worker"),
                         10 * (7 - dead))
        self.assertEqual(self.value("worker_memory_bytes", part="children"), 200)
        self.assertEqual(self.value("worker_heartbeat_age_seconds"), 15.001)
        self.assertEqual(self.value("worker_cpu_seconds_total", part="worker"), 14)
        self.assertEqual(self.value("worker_cpu_seconds_total", part="children"), 210)
        self.store.remove_worker(7)
        self.assertEqual(self.value("worker_cpu_seconds_total", part="worker"), 14)

    def test_schedules_of_one_name_are_one_series(self):
        self.schedule(next_tick=1000)
        self.schedule(expr="0 15 * * *", next_tick=900, success_at=5500)
        self.schedule("never", next_tick=None)
        found = self.parsed()
        self.assertEqual(found["schedule_next_timestamp_seconds"],
                         {(("schedule", "nightly"),): 900})
        self.assertEqual(found["schedule_last_success_timestamp_seconds"],
                         {(("schedule", "nightly"),): 5.5, (("schedule", "never"),): 0})

    def test_the_age_of_history_is_that_of_its_newest_minute(self):
        self.assertEqual(self.parsed()["history_age_seconds"], {})
        self.end()
        minute = self.now // 60_000 * 60_000
        for later, age in ((0, 0), (59_999, 0), (61_000, 1), (600_000, 540)):
            self.assertEqual(self.value("history_age_seconds", minute + later), age)

    def test_a_scrape_reads_no_task_that_is_finished(self):
        self.full()
        self.page()
        few = self.steps(self.page)
        self.fill(50_000)
        self.sql("update bg_task set state = 4, finished_at = 1 where name = 't'")
        self.assertLess(self.steps(self.page), few + 500)


# == Health ===================================================================


def ask(port, path, host="127.0.0.1", method="GET", **headers):
    """(status, body) of an HTTP request; (0, "") when nobody answers."""
    http = pybgworker.importlib.import_module("http.client")
    connection = http.HTTPConnection(host, port, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except ConnectionError:
        return 0, ""
    finally:
        connection.close()


class Healths(Served):

    def serving(self, *flags, **environment):
        """A worker with --http, and its port."""
        worker = self.worker("--concurrency", 1, "--http", "0", *flags, **environment)
        return worker, worker.wait_for("http_start")["port"]

    def test_a_worker_answers_probes_and_scrapers(self):
        worker, port = self.serving()
        self.assertEqual(worker.find("http_start")["host"], "127.0.0.1")
        worker.wait_for("worker_ready")
        until(lambda: ask(port, "/readyz") == (200, "ok\n"))
        self.assertEqual(ask(port, "/healthz"), (200, "ok\n"))
        self.get(self.tasks.add.delay(1, 2))
        until(lambda: ("pybgworker_task_runs_total", 1) in [
            (name, value) for name, (_, _, samples) in
            parse_metrics(ask(port, "/metrics")[1]).items()
            for labels, value in samples.items() if labels[-1:] == (("outcome", "success"),)])
        self.assertEqual(ask(port, "/healthz?verbose", method="HEAD"), (200, ""))
        self.assertEqual(ask(port, "/")[0], 404)
        self.assertEqual(ask(port, "/metrics", method="POST")[0], 501)
        self.assertEqual(worker.stop(), 0)
        self.assertEqual(ask(port, "/healthz"), (0, ""))

    @unittest.skipUnless(Path("/proc/net/tcp").exists(), "needs /proc")
    def test_no_child_has_the_socket_that_listens(self):
        worker, port = self.serving()
        worker.wait_for("worker_ready")
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
        inode, = [line[9] for line in lines if line[1] == f"0100007F:{port:04X}"
                  and line[3] == "0A"]
        def has_it(pid):
            return f"socket:[{inode}]" in map(os.readlink, self.links(pid))
        self.assertTrue(has_it(worker.pid))
        for pid in [worker.nursery(), *worker.children()]:
            self.assertFalse(has_it(pid))
        worker.kill()                       # and so nobody answers for it
        self.assertEqual(ask(port, "/healthz"), (0, ""))

    def links(self, pid):
        return [f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd")]

    def test_a_port_in_use_ends_a_worker_before_it_works(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.tasks.mark_me = self.tasks.once.delay("x")
            port = taken.getsockname()[1]
            worker = self.worker("--http", port)
            self.assertEqual(worker.wait(), 1)
        self.assertIn(f"--http 127.0.0.1:{port}: Address already in use: name another",
                      "".join(worker.errors))
        self.assertEqual(self.lines("ran"), [])
        self.assertEqual(self.sql("select * from bg_worker"), [])
        worker = self.worker("--http", "no.such.host.invalid:8080")
        self.assertEqual(worker.wait(), 1)
        self.assertIn("--http no.such.host.invalid:8080: ", "".join(worker.errors))
        self.assertNotIn("Traceback", "".join(worker.errors))

    def test_a_locked_database_makes_a_worker_not_ready_but_leaves_it_alive(self):
        worker, port = self.serving()
        worker.wait_for("worker_ready")
        until(lambda: ask(port, "/readyz")[0] == 200)
        lock = sqlite3.connect(self.db)
        self.addCleanup(lock.close)
        lock.execute("begin immediate")
        worker.wait_for("database_error")           # after 5 seconds of it
        status, reason = ask(port, "/readyz")
        self.assertEqual(status, 503)
        self.assertIn("locked", reason)
        self.assertEqual(ask(port, "/healthz"), (200, "ok\n"))
        self.assertEqual(ask(port, "/metrics")[0], 200)     # to read needs no lock
        lock.rollback()
        until(lambda: ask(port, "/readyz") == (200, "ok\n"))

    def probes(self):
        worker = self.worker_here()
        self.addCleanup(worker.senses.close)
        return worker, pybgworker.Probes(worker)

    def test_a_loop_that_does_not_turn_is_not_alive(self):
        worker, probes = self.probes()
        worker.liveness.turn_began -= 9
        self.assertEqual(probes.health(), (200, "ok"))
        worker.liveness.turn_began -= 2
        self.assertEqual(probes.health(),
                         (503, "the worker's loop has not turned for 11 s"))
        with mock.patch.object(worker.pool.crew, "is_ready", return_value=True):
            self.assertEqual(probes.readiness()[0], 503)    # nor is it ready
            worker.liveness.mind_the_time()
            self.assertEqual(probes.readiness(), (200, "ok"))

    def test_a_worker_is_ready_with_a_child_and_without_a_stop(self):
        worker, probes = self.probes()
        self.assertEqual(probes.readiness(), (503, "no child is ready"))
        with mock.patch.object(worker.pool.crew, "is_ready", return_value=True):
            self.assertEqual(probes.readiness(), (200, "ok"))
            worker.senses.stops.count = 1
            self.assertEqual(probes.readiness(), (503, "it is stopping"))
        self.assertEqual(probes.health(), (200, "ok"))

    def answers(self, is_local, token=None, trouble=""):
        probes = mock.Mock(**{"health.return_value": (200, "ok"),
                              "readiness.return_value": (503, "why\nmore")})
        scrapes = mock.Mock(**{"answer.return_value": (200, "a 1\n")})
        return pybgworker.probe_answers(probes, scrapes, is_local, token)

    def test_who_is_elsewhere_needs_the_token_for_all_but_yes_or_no(self):
        right, wrong = "Bearer s3cret-s3cret", "Bearer s3cret-s3creT"
        for is_local, token, given, metrics, reason in (
                (True, None, "", 200, "why\n"), (True, right[7:], "", 200, "why\n"),
                (False, None, "", 403, "no\n"), (False, None, "Bearer ", 403, "no\n"),
                (False, right[7:], "", 401, "no\n"), (False, right[7:], wrong, 401, "no\n"),
                (False, right[7:], "Bearer \xe9", 401, "no\n"),
                (False, right[7:], right, 200, "why\n")):
            with self.subTest(is_local=is_local, token=token, given=given):
                answer = self.answers(is_local, token)
                self.assertEqual(answer("/metrics", given)[0], metrics)
                self.assertEqual(answer("/healthz", given)[::2], (200, "ok\n"))
                self.assertEqual(answer("/readyz", given)[::2], (503, reason))
        self.assertEqual(self.answers(False)("/metrics", "")[2],
                         "set PYBGWORKER_WEB_TOKEN for who is elsewhere\n")

    def test_local_is_what_only_this_machine_can_reach(self):
        for host, local in (("127.0.0.1", True), ("127.9.9.9", True), ("::1", True),
                            ("localhost", True), ("0.0.0.0", False), ("::", False),
                            ("10.0.0.1", False), ("example.org", False)):
            self.assertEqual(pybgworker.is_loopback(host), local, host)

    def test_a_worker_that_listens_to_the_world_asks_scrapers_for_the_token(self):
        worker = self.worker("--concurrency", 1, "--http", "0.0.0.0:0",
                             PYBGWORKER_WEB_TOKEN="s3cret-s3cret")
        port = worker.wait_for("http_start", host="0.0.0.0")["port"]
        self.assertEqual(ask(port, "/metrics")[0], 401)
        good = ask(port, "/metrics", Authorization="Bearer s3cret-s3cret")
        self.assertEqual(good[0], 200)
        parse_metrics(good[1])

    def server(self, answer=lambda path, token: (200, "text/plain", "ok")):
        server = pybgworker.HttpServer("127.0.0.1", 0, answer)
        self.addCleanup(server.close)
        return server, server.open()

    def test_clients_that_say_nothing_keep_nobody_from_an_answer(self):
        _, port = self.server()
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
        self.assertEqual(ask(port, "/"), (200, "ok"))
        self.assertEqual(silent[0].recv(1), b"")        # the eldest was shut
        for client in silent:
            client.close()
        self.assertEqual(ask(port, "/"), (200, "ok"))

    def test_what_is_no_http_is_refused(self):
        _, port = self.server()
        for data in (b"\0" * 100 + b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n",
                     b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b"\r\n\r\n",
                     b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b""):
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                with contextlib.suppress(ConnectionError):
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                    self.assertNotIn(b" 200 ", client.recv(1000))
        self.assertEqual(ask(port, "/"), (200, "ok"))

    def test_a_server_that_is_closed_leaves_no_thread_and_no_port(self):
        before = threading.active_count()
        server, port = self.server()
        self.assertEqual(ask(port, "/"), (200, "ok"))
        server.close()
        server.close()
        until(lambda: threading.active_count() == before)
        self.assertEqual(ask(port, "/"), (0, ""))

    def test_one_scrape_serves_all_who_ask_within_a_second(self):
        scrapes = pybgworker.Scrapes(self.store, self.app.settings)
        clock = [100.0]
        with mock.patch.object(pybgworker.time, "monotonic", lambda: clock[0]), \
                mock.patch.object(pybgworker, "metrics_text") as text:
            for at, calls in ((0, 1), (0.5, 1), (0.99, 1), (1.01, 2)):
                clock[0] = 100 + at
                scrapes.answer()
                self.assertEqual(text.call_count, calls)

    def test_a_scrape_that_takes_too_long_is_given_up(self):
        scrapes = pybgworker.Scrapes(self.store, self.app.settings)
        self.fill(20_000)
        with mock.patch.object(pybgworker, "_SCRAPE_LIMIT", -1.0):
            status, text = scrapes.answer()
        self.assertEqual(status, 503)
        self.assertIn("this takes too long", text)
        scrapes = pybgworker.Scrapes(self.store, self.app.settings)
        self.assertEqual(scrapes.answer()[0], 200)      # the next may take its time

    def test_a_process_that_only_reads_is_ready_while_it_can(self):
        store = self.store
        self.assertEqual(pybgworker.readiness_of(store), (200, "ok"))
        self.db.unlink()
        status, reason = pybgworker.readiness_of(store)
        self.assertEqual(status, 503)
        self.assertIn("it is gone", reason)

    # -- systemd

    def manager(self, abstract=False):
        """A socket as systemd has one, and its name in NOTIFY_SOCKET."""
        path = str(self.folder / "notify")
        name = f"@{path}" if abstract else path
        ear = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(ear.close)
        ear.bind("\0" + path if abstract else path)
        ear.settimeout(20)
        return ear, name

    def heard(self, ear, line):
        """All lines up to one that begins so."""
        lines = []
        while not [found for found in lines if found.startswith(line)]:
            lines += ear.recv(4096).decode().split("\n")
        return lines

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    def test_systemd_hears_that_a_worker_is_ready_turns_and_stops(self):
        for abstract in (False, True)[:1 + pybgworker.IS_LINUX]:
            ear, name = self.manager(abstract)
            worker = self.worker("--concurrency", 1, NOTIFY_SOCKET=name,
                                 WATCHDOG_USEC="30000000")
            said = self.heard(ear, "READY=1")
            self.assertTrue(worker.wait_for("worker_ready"))
            self.assertIn("WATCHDOG=1", said + self.heard(ear, "WATCHDOG=1"))
            self.heard(ear, "STATUS=0 of 1 busy, 0 waiting")
            self.tasks.hold.delay()
            self.wait_lines("held")
            worker.signal(signal.SIGTERM)
            said = self.heard(ear, "EXTEND_TIMEOUT_USEC=")
            self.assertIn("STOPPING=1", said)
            self.heard(ear, "WATCHDOG=1")           # it still turns
            (self.folder / "go").touch()
            self.assertEqual(worker.wait(), 0)
            (self.folder / "go").unlink()
            (self.folder / "held").unlink()

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    def test_what_systemd_said_to_the_worker_is_not_for_its_children(self):
        (self.folder / "curious.py").write_text(textwrap.dedent("""
            import os
            from pybgworker import task
            at_import = sorted(os.environ)
            @task(name="names")
            def names(): return at_import + sorted(os.environ)
            """))
        for method in ("fork", "spawn"):
            _, name = self.manager(abstract=method == "spawn" and pybgworker.IS_LINUX)
            worker = self.worker("--concurrency", 1, "--start-method", method,
                                 app="curious", NOTIFY_SOCKET=name, HERE="yes",
                                 WATCHDOG_USEC="9000000", WATCHDOG_PID="1")
            names = self.get(self.app.send("names"))
            self.assertEqual(names.count("HERE"), 2)
            self.assertFalse({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & {*names})
            worker.kill()
            Path(name).unlink(missing_ok=True)

    def test_a_watchdog_is_told_at_half_its_time_or_once_a_second(self):
        for usec, pid, seconds in (
                ("30000000", None, 1.0), ("1000000", None, 0.5), ("", None, None),
                ("soon", None, None), ("0", None, None), ("-5", None, None),
                ("30000000", "7", 1.0), ("30000000", "8", None), ("9", "x", None)):
            environ = {"WATCHDOG_USEC": usec}
            if pid:
                environ["WATCHDOG_PID"] = pid
            self.assertEqual(pybgworker.watchdog_seconds(environ, 7), seconds)
        self.assertIsNone(pybgworker.watchdog_seconds({}, 7))

    def test_a_thousand_turns_a_second_ping_once(self):
        worker = self.worker_here()
        self.addCleanup(worker.senses.close)
        said, clock = [], [100.0]
        with mock.patch.dict(os.environ, {"WATCHDOG_USEC": "30000000"}), \
                mock.patch.object(pybgworker, "notify_service", said.append), \
                mock.patch.object(pybgworker.time, "monotonic", lambda: clock[0]):
            service = pybgworker.Service(worker)
            for _ in range(3500):
                clock[0] += 0.001
                service.tell(0)
        pings = [line for text in said for line in text.split("\n")
                 if line == "WATCHDOG=1"]
        self.assertEqual(len(pings), 4)

    def test_nobody_is_told_where_nobody_listens(self):
        for name in ("", "relative", "/no/such/socket", "@nobody", "/" + "x" * 300,
                     "vsock:2:1"):
            with mock.patch.dict(os.environ, {"NOTIFY_SOCKET": name}):
                pybgworker.notify_service("READY=1")

    # -- the command

    def health(self, *argv):
        """(exit status, what was printed) of the command, here."""
        with contextlib.redirect_stdout(io.StringIO()) as out, \
                mock.patch.dict(os.environ, {"PYBGWORKER_DB": str(self.db)}):
            status = pybgworker.main(["health", *argv])
        return status, out.getvalue().strip()

    def live(self, **columns):
        """A worker that has beaten just now."""
        add_workers(self.store, 1)
        now = pybgworker.now_ms()
        for column, value in {"beat_at": now, "concurrency": 2, "name": "w1",
                              "state": "ready", **columns}.items():
            self.sql(f"update bg_worker set {column} = ?", value)

    def test_health_is_one_line_and_a_status(self):
        self.assertEqual(self.health()[0], 1)
        self.assertIn("there is no database", self.health()[1])
        self.app.store.create()
        self.assertEqual(self.health(), (1, "no worker runs"))
        self.live()
        self.sql("insert into bg_child values (1, 11, 1, 0, 0)")
        self.assertEqual(self.health(), (0, "ok: 1 worker, 1 of 2 children busy"))
        self.assertEqual(self.health("--worker", "w1")[0], 0)
        self.assertEqual(self.health("--worker", "w2"),
                         (1, "no worker named w2 runs"))
        for columns, say in (
                ({"beat_at": 1}, "w1 is dead"), ({"state": "starting"}, "w1 is starting"),
                ({"state": "stopping"}, "w1 is stopping"),
                ({"note": "cannot write since 14:00:12 UTC: disk full"},
                 "w1 cannot write since 14:00:12 UTC: disk full")):
            self.live(**columns)
            self.assertEqual(self.health(), (1, say))
            self.live(note=None)

    def test_health_knows_how_old_tasks_may_be(self):
        self.live()
        now = pybgworker.now_ms()
        self.app.send("t", queue="mail")
        self.sql("update bg_task set run_at = ?", now - 360_500)
        self.assertEqual(self.health("--max-age", "mail=1h", "--max-age", "x=1s")[0], 0)
        status, say = self.health("--max-age", "mail=5m", "--max-age", "x=1s")
        self.assertEqual((status, say), (1, "queue mail: its oldest task waits for "
                                         "6.0 min, at most 5.0 min is allowed"))
        self.store.pause("mail", now)
        self.assertIn(", and is paused", self.health("--max-age", "mail=5m")[1])
        self.sql("update bg_task set state = 0, run_at = ?", now + 10**6)   # for later
        self.assertEqual(self.health("--max-age", "mail=5m")[0], 0)

    def test_health_knows_how_many_may_fail(self):
        self.live()
        minute = pybgworker.now_ms() // 60_000 * 60
        for minutes, failed in ((0, 4), (30, 6), (90, 100)):
            self.sql("insert into bg_history (span, at, name, queue, lo, hi, runs, failed)"
                     " values (60, ?, 'a', 'b', 1, 1, 900, ?)", minute - minutes * 60,
                     failed)
        self.assertEqual(self.health("--max-failed", "10/h")[0], 0)
        self.assertEqual(self.health("--max-failed", "9/h"),
                         (1, "10 tasks failed in the last hour, at most 9 may"))
        self.assertEqual(self.health("--max-failed", "110/d")[0], 0)
        self.assertEqual(self.health("--max-failed", "109/d")[0], 1)

    def test_health_tells_programs_all_it_has_found(self):
        self.live()
        status, text = self.health("--json", "--max-age", "mail=5m", "--max-failed", "0/h")
        self.assertEqual(json.loads(text), {
            "ok": True, "say": "ok: 1 worker, 0 of 2 children busy", "problems": [],
            "workers": 1, "children": 2, "busy": 0, "ages": {"mail": 0.0}, "failed": 0})
        self.sql("delete from bg_worker")
        status, text = self.health("--json", "--max-failed", "0/h")
        self.assertEqual((status, json.loads(text)["problems"]), (1, ["no worker runs"]))

    def test_health_refuses_what_is_no_limit(self):
        for argv in (["--max-age", "5m"], ["--max-age", "mail=soon"],
                     ["--max-failed", "many"], ["--max-failed", "5/week"]):
            with contextlib.redirect_stderr(io.StringIO()) as said, \
                    self.assertRaises(SystemExit) as end:
                pybgworker.main(["health", *argv])
            self.assertEqual(end.exception.code, 2)
            self.assertIn("must be", said.getvalue())

    def test_health_says_in_a_real_process_what_a_real_worker_does(self):
        worker = self.worker("--concurrency", 1, "--worker-name", "w1")
        worker.wait_for("worker_ready")
        done = until(lambda: self.cli("health", "--worker", "w1"))
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertEqual(done.stdout, "ok: 1 worker, 0 of 1 children busy\n")
        worker.kill()
        done = self.cli("health")
        self.assertEqual((done.returncode, done.stdout), (1, "w1 is dead\n"))


# == Listeners ================================================================

class Listeners(Case):

    SOURCE = """
        import os, signal, time

        def note(event):
            with open("heard", "a") as f:
                f.write(f"{event!r} {event.queue} {event.error and event.error.kind} "
                        f"{event.worker} {event.at:%Y} {event.meta}\\n")

        for kind in ("success", "failure", "retry", "crash", "timeout", "lost"):
            on(kind)(note)

        @task(queue="q")
        def good():
            pass

        @task(queue="q", retries=1, retry_delay=0)
        def bad():
            raise KeyError("x")

        @task(queue="q", retries=0)
        def crash():
            os.kill(os.getpid(), signal.SIGSEGV)

        @task(queue="q", retries=0, timeout=0.2)
        def slow():
            time.sleep(60)

        @task(queue="q", retries=0)
        def stay():
            open("stays", "w").close()
            time.sleep(60)
    """

    def heard(self, count):
        path = self.folder / "heard"
        until(lambda: path.exists() and path.read_text().count("\n") >= count, 30,
              f"{count} lines")
        return sorted(path.read_text().splitlines())

    def test_each_kind_hears_of_its_ends_in_a_child(self):
        tasks = self.module(self.SOURCE)
        year = time.strftime("%Y", time.gmtime())
        for name, expected in (
            ("good", ["<success of task 1 tasks.good, run 1> q None"]),
            ("bad", ["<failure of task 1 tasks.bad, run 2 KeyError: 'x'> q exception",
                     "<retry of task 1 tasks.bad, run 1 KeyError: 'x'> q exception"]),
            ("crash", ["<crash of task 1 tasks.crash, run 1 ", "<failure of task 1"]),
            ("slow", ["<failure of task 1 tasks.slow, run 1 ", "<timeout of task 1 "]),
        ):
            with self.subTest(name):
                (self.folder / "heard").unlink(missing_ok=True)
                self.db = self.folder / f"{name}.db"
                pybgworker.configure(db=str(self.db))
                worker = self.worker("--worker-name", "w")
                getattr(tasks, name).delay()
                lines = self.heard(len(expected))
                worker.stop()
                self.assertEqual(len(lines), len(expected), lines)
                for line, begin in zip(lines, expected):
                    self.assertTrue(line.startswith(begin), line)
                    self.assertTrue(line.endswith(f" w {year} {{}}"), line)

    def test_who_reaps_a_run_has_its_listeners_told(self):
        tasks = self.module(self.SOURCE)
        first = self.worker("--worker-name", "first")
        tasks.stay.delay()
        until((self.folder / "stays").exists, what="its begin")
        first.kill()
        self.worker("--worker-name", "second")
        lines = self.heard(2)
        self.assertTrue(lines[0].startswith("<failure of task 1 tasks.stay, run 1 lost"))
        self.assertTrue(lines[1].startswith("<lost of task 1 tasks.stay, run 1 lost"))
        self.assertTrue(all(" q lost first " in line for line in lines), lines)

    def test_one_that_fails_is_told_again_alone(self):
        tasks = self.module("""
            def note(text):
                with open("heard", "a") as f:
                    f.write(text + "\\n")

            @on("failure")
            async def first(event):
                note(f"first {event.id} {current_task().attempt}")

            @on("failure")
            def second(event):
                note(f"second {event.id} {current_task().attempt}")
                if current_task().attempt == 1:
                    raise OSError("no network")

            @task(retries=0, queue="q")
            def bad():
                raise KeyError
        """)
        self.worker("--queues", "q")
        tasks.bad.delay()
        self.assertEqual(self.heard(3), ["first 1 1", "second 1 1", "second 1 2"])

    def test_without_listeners_nothing_follows_an_end(self):
        self.assertEqual(self.module("@task\ndef t(): pass").t.callbacks, 0)
        self.assertEqual(self.module(
            "on('retry')(print)\n@task\ndef t(): pass").t.callbacks, 16)
        telling = pybgworker.default_app.tasks["on:retry"]
        self.assertEqual(telling.callbacks, 0)

    def test_what_it_cannot_be_is_an_error(self):
        def ticks(event):
            yield event

        for kind, fn in (("failed", print), (None, print), ("failure", 3),
                         ("failure", ticks)):
            with self.subTest(kind=kind), self.assertRaises(pybgworker.OptionError):
                self.app.on(kind)(fn)
        with self.assertRaisesRegex(pybgworker.AppError, "on:failure"):
            self.app.task(print, name="on:failure")

    def test_a_function_that_is_loaded_anew_listens_once(self):
        code = compile("def note(event): pass", "x.py", "exec")
        for _ in range(2):
            scope = {"__name__": "x"}
            exec(code, scope)
            self.app.on("lost")(scope["note"])
        self.assertEqual(self.app.listeners["lost"], [scope["note"]])

    def event(self, **about):
        return pybgworker.TaskEvent(
            {"kind": "failure", "id": 1, "name": "t", "queue": "q", "attempt": 1,
             "error": {"kind": "exception", "type": "KeyError", "message": "'x'"},
             "worker": "w", "at": 0, **about}, self.store)

    def test_the_first_of_a_storm_is_told_from_the_others(self):
        self.store.now = lambda: self.now
        self.assertTrue(self.event().first_in(300))
        self.assertFalse(self.event(id=2).first_in(300))
        self.assertTrue(self.event(name="u").first_in(300))
        self.assertTrue(self.event(error={"kind": "crash", "message": ""}).first_in(300))
        self.assertTrue(self.event(kind="retry", error=None).first_in(300))
        self.now += 299_999
        self.assertFalse(self.event().first_in(300))
        self.now += 1
        self.assertTrue(self.event().first_in(300))
        # What is over leaves no row behind.
        self.now += 300_000
        self.event(name="v").first_in(1)
        self.assertEqual(len(self.sql("select * from bg_rate")), 1)

    def test_of_many_at_once_one_is_the_first(self):
        start, found = threading.Barrier(8), []

        def ask():
            start.wait()
            found.append(self.event().first_in(300))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(sorted(found), [False] * 7 + [True])


class Unheard(QueueCase):
    """More ends than listeners can be told of."""

    def test_a_thousand_wait_and_more_are_counted(self):
        self.enqueue(count=1200)
        runs = [run for _ in range(12) for run in self.claim(callbacks={"t": 8})]
        error = {"kind": "exception", "message": "no"}
        counts = []
        for at in range(0, 1200, 100):
            outcomes = [Outcome(
                run, pybgworker.FAILED, error=error, then=pybgworker.callback_rows(
                    run, pybgworker.FAILED, error, self.now, "w"))
                for run in runs[at:at + 100]]
            counts.append(self.turn(outcomes=outcomes).unheard)
        self.assertEqual(counts, [0] * 10 + [100, 100])
        self.assertEqual(self.sql("select count(*) from bg_task where name = 'on:failure'"),
                         [(1000,)])
        self.assertEqual(self.sql("select count(*) from bg_task where state = 5"),
                         [(1200,)])

    def test_a_retry_that_is_cancelled_meanwhile_is_none(self):
        task_id = self.enqueue()
        run, = self.claim(callbacks={"t": 16})
        self.store.cancel(task_id, self.now)
        then = pybgworker.callback_rows(run, pybgworker.RETRYING, None, self.now, "w")
        self.assertEqual(len(then), 1)
        self.finish(run, pybgworker.RETRYING, run_at=self.now, then=then)
        self.assertEqual(self.status(task_id), "cancelled")
        self.assertEqual(self.sql("select name from bg_task"), [("t",)])

    def test_the_log_counts_them_at_once_and_then_in_portions(self):
        out = tempfile.TemporaryFile()
        self.addCleanup(out.close)
        journal = pybgworker.Journal(Log(out.fileno()), "w")
        for runs, at in ((0, 0), (3, self.now), (4, self.now + 1), (5, self.now + 9999),
                         (0, self.now + 10_000), (0, self.now + 90_000)):
            journal.unheard(runs, at)
        journal.log.flush(1)
        out.seek(0)
        self.assertEqual([json.loads(line)["runs"] for line in out], [3, 9])


# == Bench ====================================================================


class Bench(Case):

    def test_it_says_what_bounds_a_worker(self):
        limit = pybgworker._limit_of_worker
        self.assertEqual(limit(0.2, 0.3, 1), "fsync 70%")
        self.assertEqual(limit(0.9, 0.3, 1), "worker CPU 90%")
        self.assertEqual(limit(0.5, 0.8, 1), "child CPU 80%")

    def test_it_says_which_state_of_the_log_it_measured(self):
        self.assertEqual(
            pybgworker._state_of_logs([(1, 1), (2, 2), (4, 3), (4, 4), (4, 5)]),
            {"ours": "overwritten", "raw": "lengthened"})

    def test_it_measures_beside_raw_sqlite(self):
        done = self.cli("bench", "--tasks", 300, "--concurrency", 1, "--payload", "2k",
                        "--json", timeout=300)
        self.assertEqual(done.stderr, "")
        report = json.loads(done.stdout)
        limit = r"(fsync|(caller|worker|child) CPU) \d+%"
        for key in ("delay_per_second", "threads_per_second", "delay_many_per_second",
                    "tasks_per_second", "once_per_second"):
            figures = report[key]
            self.assertGreater(figures["ours"], 0)
            self.assertRegex(figures["limit"], limit)
            self.assertAlmostEqual(figures["ratio"], figures["ours"] / figures["raw"], 1)
        for key in ("pick_up_seconds", "get_seconds"):
            self.assertLessEqual(report[key]["p50"], report[key]["p99"])
            self.assertRegex(report[key]["limit"], limit)
        self.assertGreater(report["wal_bytes"], 0)
        self.assertLess(report["wal_bytes"], 2 * pybgworker.CALLER_CHECKPOINT_BYTES)
        self.assertEqual(set(report["wal"]), {"ours", "raw"})
        for key, ideal in (("ordinary_per_second", 1600),   # 16 children, 10 ms each
                           ("in_threads_per_second", 640),  # 2 times 32 threads, 0.1 s
                           ("coroutines_per_second", 2000)):        # 2 times 100
            waiting = report[key]
            self.assertEqual(waiting["raw"], ideal)
            self.assertLess(waiting["ratio"], 1.3)
            self.assertRegex(waiting["limit"], r"worker CPU [\d.]+ ms a task")
        self.assertEqual(report["once_per_second"]["raw"],
                         report["tasks_per_second"]["raw"])
        self.assertGreater(report["cpu_of_one_task"], 0)
        self.assertEqual((report["payload"], report["concurrency"]), (2048, 1))
        text = pybgworker.bench_text(report)
        self.assertIn("delay(), durable, a second", text)
        self.assertIn("async tasks of 100 ms, 100 coroutines in each of 2 children", text)
        self.assertIn("The -wal of ours: ", text)
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()), [])


# == Old import paths =========================================================


class OldImportPaths(Case):

    APP = """
        import {name}
        from {name}.task import task
        from {name}.scheduler import cron
        from {name}.config import configure
        from {name} import task as new
        assert task is new

        @task(name="old")
        @cron("0 0 1 1 *")
        def old():
            return "old"
    """

    def prepare(self, package=""):
        folder = self.folder
        for part in package.split(".") if package else ():
            folder = folder / part
            folder.mkdir()
            (folder / "__init__.py").write_text("")
        shutil.copy(HERE / "pybgworker.py", folder / "pybgworker.py")
        name = f"{package}.pybgworker" if package else "pybgworker"
        source = textwrap.dedent(self.APP).format(name=name)
        (self.folder / "oldapp.py").write_text(source)

    def start(self, *argv):
        environ = clean_environment(PYBGWORKER_DB=str(self.db), PYTHONPATH="",
                                    PYTHONWARNINGS="error")
        done = subprocess.run([sys.executable, *argv], cwd=self.folder, env=environ,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        made = f"pybgworker: made the database {self.db}\n"
        self.assertEqual((done.returncode, done.stderr.replace(made, "")), (0, ""))
        return done.stdout

    def test_every_form_of_start_shares_one_registry(self):
        for package, forms in (
            ("", (["pybgworker.py"], ["-m", "pybgworker"], ["-m", "pybgworker.cli"])),
            ("vendor", (["-m", "vendor.pybgworker"], ["-m", "vendor.pybgworker.cli"],
                        ["vendor/pybgworker.py"])),
            ("my.vendor", (["my/vendor/pybgworker.py"],)),
        ):
            self.setUp()
            self.prepare(package)
            for form in forms:
                self.start(*form, "enqueue", "old", "--queue", "default")
                out = self.start(*form, "run", "--app", "oldapp", "--burst")
                with self.subTest(form):
                    self.assertIn('"tasks":["old"]', out)
                    self.assertIn("task_success", out)

    @unittest.skipUnless(os.path.exists("/proc/self/cmdline"), "needs /proc")
    def test_a_worker_started_as_a_script_runs_the_compiled_file(self):
        self.prepare()
        worker = self.worker(app="oldapp")
        worker.wait_for("worker_ready")
        command = Path(f"/proc/{worker.pid}/cmdline").read_bytes().split(b"\0")
        self.assertIn(b"-c", command)
        self.assertFalse([part for part in command if part.endswith(b"pybgworker.py")])

    def test_importing_does_nothing_else(self):
        code = """
            import os, signal, sys, threading
            before = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
            handlers = [signal.getsignal(n) for n in (2, 15, 14)]
            import pybgworker
            after = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc") else 0
            assert before == after and threading.active_count() == 1
            assert handlers == [signal.getsignal(n) for n in (2, 15, 14)]
            heavy = {"argparse", "asyncio", "subprocess", "logging", "ctypes", "uuid"}
            assert not heavy & set(sys.modules), heavy & set(sys.modules)
            print(os.listdir("."))
        """
        self.assertEqual(self.python(code).stdout, "[]\n")


# == Any sequence =============================================================


class Model:
    """What the Store should do, as a dict: state, attempt, forgiven, worker, key.

    `place` is what the Store's means: a retry goes behind all that is there.
    """

    def __init__(self):
        self.rows, self.paused, self.last = {}, set(), 0
        self.workers, self.behind = {1, 2}, 0

    def enqueue(self, now, queue, priority, key, retries, at):
        for number, row in self.rows.items():
            if key and row["key"] == key and row["state"] in (0, 1, 2, 3):
                return number
        self.last += 1
        self.rows[self.last] = dict(
            state=0 if at > now else 2, queue=queue, priority=priority, key=key,
            retries=retries, run_at=at, attempt=0, forgiven=0, worker=None, asked=False,
            alone=False, place=(self.behind, "new"))
        return self.last

    def queue_behind(self, row):
        self.behind += 1
        row.update(state=2, place=(self.behind - 1, "retried"))

    def claim(self, now, worker, free, alone, most):
        if worker not in self.workers:
            return []
        due = sorted((row["run_at"], number) for number, row in self.rows.items()
                     if row["state"] < 2 and row["run_at"] <= now)
        for _, number in due:
            row = self.rows[number]
            if row["state"] == 1:
                self.queue_behind(row)
            row["state"] = 2
        ready = sorted((row["priority"], row["place"], number)
                       for number, row in self.rows.items()
                       if row["state"] == 2 and row["queue"] not in self.paused)
        taken, left = [], most - sum(row["state"] == 3 for row in self.rows.values())
        for _, _, number in ready:
            row = self.rows[number]
            if len(taken) < min(free, left) and (alone or not row["alone"]):
                row.update(state=3, worker=worker, attempt=row["attempt"] + 1)
                taken.append((number, row["attempt"]))
                alone = max(0, alone - 1)
        return taken

    def owned(self, number, worker, attempt):
        row = self.rows.get(number)
        return row if row and (row["state"], row["worker"], row["attempt"]) == (
            3, worker, attempt) else None

    def finish(self, now, number, worker, attempt, state, at):
        row = self.owned(number, worker, attempt)
        if row is None:
            return False
        row["state"] = 6 if row["asked"] and state < 3 else state
        row["alone"] = False
        row["run_at"] = at if state == 1 else row["run_at"]
        return True

    def give_back(self, now, number, worker, attempt, started, alone):
        row = self.owned(number, worker, attempt)
        if row:
            row["alone"] = alone
            row["state"] = 6 if row["asked"] else 2
            row["forgiven" if started else "attempt"] += 1 if started else -1

    def reap(self, now, worker, begun):
        self.workers.discard(worker)
        for number, row in self.rows.items():
            if row["state"] == 3 and row["worker"] == worker:
                had_begun = begun is None or (number, row["attempt"]) in begun
                used = row["attempt"] - row["forgiven"] > row["retries"]
                row["state"] = 6 if row["asked"] else 5 if used and had_begun else 2
                row["attempt"] -= not had_begun
                row["asked"] = False

    def cancel(self, now, number):
        row = self.rows[number]
        if row["state"] < 3:
            row["state"] = 6
        elif row["state"] == 3:
            row["asked"] = True

    def retry(self, now, number):
        row = self.rows[number]
        taken = row["key"] and any(
            r["key"] == row["key"] and r["state"] < 4 for r in self.rows.values())
        if row["state"] > 3 and not taken:
            self.queue_behind(row)
            row.update(forgiven=row["attempt"], asked=False, run_at=now, alone=False)

    def purge(self, now):
        for row in self.rows.values():
            row["state"] = 6 if row["state"] < 3 else row["state"]

    def prune(self, now):
        self.rows = {n: row for n, row in self.rows.items() if row["state"] < 4}

    def shown(self):
        return [(n, row["state"], row["attempt"], row["forgiven"], row["alone"])
                for n, row in sorted(self.rows.items())]


class Player:
    """Runs a program on the Store and on the Model, and compares after each step."""

    def __init__(self, store, groups=False):
        self.store, self.model, self.runs = store, Model(), []
        self.most_alone = 0 if groups else 9    # they are met in order only
        add_workers(store, *self.model.workers)

    def step(self, operation):
        name, now, *rest = operation
        before = self.states()
        getattr(self, "do_" + name)(now, *rest)
        for number, state in self.states().items():
            self.check_move(name, before.get(number, state), state)
        rows = self.store.db.read(
            "select id, state, attempt, forgiven, alone from bg_task order by id")
        assert rows == self.model.shown(), f"{rows}\n!= {self.model.shown()}"

    def states(self):
        return dict(self.store.db.read("select id, state from bg_task"))

    def check_move(self, name, before, after):
        """Every change is a move of the table, or two (a claim of what is due)."""
        moves = pybgworker.MOVES[before]
        two = set().union(*(pybgworker.MOVES[state] for state in moves))
        assert before == after or after in moves or name == "claim" and after in two
        assert before == after or before not in pybgworker.FINISHED or name == "retry"

    def do_enqueue(self, now, queue, priority, key, retries, wait):
        at = now + wait
        task = NewTask("t", queue, priority, key, retries, None, 0 if wait > 0 else 2,
                       at, now)
        ids = self.store.enqueue(task, ["[[],{}]"])
        assert ids == [self.model.enqueue(now, queue, priority, key, retries, at)]

    def do_claim(self, now, worker, free, alone=9, most=99):
        alone = min(alone, self.most_alone)
        order = pybgworker.ClaimOrder(worker, None, {"t"}, free, 0, set(), {},
                                      alone=alone, most_running={"t": most})
        found, _ = self.store.peek(order, now)
        turn = pybgworker.Turn(worker, order=order)
        runs = self.store.turn(turn, now, 5.0).claimed.runs
        assert found or not runs or worker not in self.model.workers
        assert [(r.id, r.attempt) for r in runs] == self.model.claim(
            now, worker, free, alone, most)
        self.runs += [(worker, run) for run in runs]

    def pick(self, n):
        return self.runs[n % len(self.runs)] if self.runs else (0, None)

    def do_finish(self, now, n, state, wait):
        worker, run = self.pick(n)
        if run:
            at = now + wait if state == 1 else None
            turn = pybgworker.Turn(worker, [Outcome(run, state, run_at=at)])
            stale = self.store.turn(turn, now, 5.0).stale
            mine = self.model.finish(now, run.id, worker, run.attempt, state, now + wait)
            assert bool(stale) != mine

    def do_give_back(self, now, n, started, marks=False):
        worker, run = self.pick(n)
        if run:
            run.alone |= started and marks
            part = {"stopped" if started else "unbegun": [run]}
            self.store.turn(pybgworker.Turn(worker, **part), now, 5.0)
            self.model.give_back(now, run.id, worker, run.attempt, started, run.alone)
            if not started:     # this very claim is no longer anybody's
                self.runs.remove((worker, run))

    def do_reap(self, now, worker, kept=None):
        """`kept`: of so many in five runs of the dead worker it is known that they began.
        """
        begun = None if kept is None else {
            (run.id, run.attempt) for _, run in self.runs if run.id % 5 < kept}
        self.store.reap(worker, "w", now, None, begun)
        self.model.reap(now, worker, begun)
        if begun is not None:   # these very claims are no longer anybody's
            self.runs = [(by, run) for by, run in self.runs
                         if by != worker or (run.id, run.attempt) in begun]

    def do_register(self, now, worker):
        add_workers(self.store, worker)
        self.model.workers.add(worker)

    def do_cancel(self, now, n):
        self.on_row(n, self.store.cancel, self.model.cancel, now)

    def do_retry(self, now, n):
        self.on_row(n, self.store.retry, self.model.retry, now)

    def on_row(self, n, ours, models, now):
        ids = sorted(self.model.rows)
        if ids:
            with contextlib.suppress(pybgworker.TaskStateError):
                ours(ids[n % len(ids)], now)
            models(now, ids[n % len(ids)])

    def do_purge(self, now):
        self.store.purge(None, None, now)
        self.model.purge(now)

    def do_prune(self, now):
        self.store.prune(0, now + 10**9, now + 10**9, 10_000)
        self.model.prune(now)

    def do_pause(self, now, queue):
        self.store.pause(queue, now)
        self.model.paused.add(queue)

    def do_resume(self, now, queue):
        self.store.resume(queue)
        self.model.paused.discard(queue)


def random_program(chance, length=60):
    now, program = 1_800_000_000_000, []
    for _ in range(length):
        now += chance.choice((0, 1, 50, 5000, -2000))
        program.append(chance.choice((
            lambda: ("enqueue", now, chance.choice("ab"), chance.randrange(3),
                     chance.choice((None, None, "k", "l")), chance.randrange(3),
                     chance.choice((0, 0, 100))),
            lambda: ("claim", now, chance.randrange(1, 3), chance.randrange(1, 4),
                     chance.randrange(3), chance.choice((1, 2, 99))),
            lambda: ("finish", now, chance.randrange(9), chance.choice((4, 4, 5, 6, 1)),
                     chance.choice((0, 60))),
            lambda: ("give_back", now, chance.randrange(9), chance.random() < 0.5,
                     chance.random() < 0.5),
            lambda: ("reap", now, chance.randrange(1, 3), chance.choice((None, 0, 2))),
            lambda: ("register", now, chance.randrange(1, 3)),
            lambda: ("cancel", now, chance.randrange(9)),
            lambda: ("retry", now, chance.randrange(9)),
            lambda: (chance.choice(("purge", "prune", "claim", "claim")), now),
            lambda: (chance.choice(("pause", "resume")), now, chance.choice("ab")),
        ))())
    return [op if op != ("claim", op[1]) else ("claim", op[1], 1, 3) for op in program]


TORTURE = float(os.environ.get("PYBGWORKER_TORTURE", "0"))


class AnySequence(Case):

    def failure_of(self, program, groups=False):
        """What goes wrong when the program runs on a new database, or None."""
        with contextlib.ExitStack() as patches:
            if groups:
                patches.enter_context(mock.patch.object(
                    pybgworker.Look, "_offer_in_order", return_value=False))
            return self.failure_in(program, groups)

    def failure_in(self, program, groups):
        path = self.folder / f"model-{random.random()}.db"
        store = SqliteStore(str(path), durability="normal")
        store.create()
        player = Player(store, groups)
        try:
            for operation in program:
                player.step(operation)
        except AssertionError as exc:
            return str(exc) or "an assertion"
        finally:
            store.close()
            for found in self.folder.glob(path.name + "*"):
                found.unlink()

    def shrunk(self, program, groups):
        """The program without the operations that its failure does not need."""
        for i in reversed(range(len(program))):
            shorter = program[:i] + program[i + 1:]
            if self.failure_of(shorter, groups):
                program = shorter
        return program

    def test_any_sequence_of_operations_agrees_with_the_model(self):
        seed, done, end = 0, 0, time.monotonic() + TORTURE
        while seed < 100 or TORTURE and (time.monotonic() < end or done < 100_000):
            seed += 1
            program = random_program(random.Random(seed))
            done += len(program)
            groups = seed % 2       # every other one is claimed from group to group
            if self.failure_of(program, groups):
                small = self.shrunk(program, groups)
                self.fail(f"seed {seed}:\n" + "\n".join(map(str, small))
                          + f"\n{self.failure_of(small, groups)}")
        if TORTURE:
            print(f"\nmodel: {seed} programs, {done} operations agree")

    OPERATIONS = (
        ("claim", 0, 1, 1), ("finish", 0, 0, 4, 0), ("reap", 0, 1), ("cancel", 0, 0),
        ("finish", 0, 0, 5, 0), ("retry", 0, 0), ("claim", 0, 2, 1),
    )

    def test_every_order_of_operations_over_two_and_three_connections(self):
        """claim, finish, reap, cancel, late finish, retry; another claim if long."""
        operations = self.OPERATIONS if TORTURE else self.OPERATIONS[:6]
        stores = [SqliteStore(str(self.db), durability="normal") for _ in range(3)]
        for store in stores:
            store.create()
            self.addCleanup(store.close)
        for count in (2, 3):
            for order in itertools.permutations(operations):
                self.sql_on(stores[0], "delete from bg_task", "delete from bg_payload",
                            "delete from bg_worker", "update bg_meta set value = 0")
                player = Player(stores[0])
                program = [("enqueue", 0, "a", 5, "k", 1, 0), *order]
                for number, (name, _, *rest) in enumerate(program):
                    player.store = stores[number % count]
                    try:
                        player.step((name, self.now + number, *rest))
                    except AssertionError as exc:
                        self.fail(f"{count} connections: {program[:number + 1]}\n{exc}")

    def sql_on(self, store, *statements):
        with store.db.write() as link:
            for statement in statements:
                link.connection.execute(statement)


# == Torture ==================================================================


class Torture(Served):
    """kill -9 at random: producers, workers, children; then the invariants."""

    PRODUCER = """
        import os, random, sys, time
        sys.path.insert(0, ".")
        import tasks
        journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        chance = random.Random(int(sys.argv[1]))
        while True:
            n = chance.randrange(1, 5)
            ids = [r.id for r in tasks.tortured.delay_many([(k,) for k in range(n)])]
            ids.append(tasks.paced.options(key=f"p{chance.randrange(20)}").delay().id)
            ids.append(tasks.broken.options(key=f"k{n}").delay().id)
            os.write(journal, "".join(f"{i}\\n" for i in ids).encode())
            os.fsync(journal)
            time.sleep(0.003)
    """

    def setUp(self):
        super().setUp()
        self.tasks = self.module(TASKS + """
    @task(retries=50, retry_delay=0)
    def tortured(k):
        t = current_task()
        fd = os.open("starts", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{t.id} {t.attempt}\\n".encode())
        os.close(fd)
        if k == 3:
            time.sleep(0.02)
        if k == 4 and t.attempt % 3 == 1:
            os.kill(os.getpid(), 9)
        return k

    @task(retries=50, retry_delay=0, rate_limit=40, priority=1)
    def paced():
        fd = os.open("paces", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{time.time()}\\n".encode())
        os.close(fd)

    @task(retries=1, retry_delay=0)
    def broken():
        raise ValueError("always")

    @task(retries=0)
    def unrepeated(k):
        t = current_task()
        fd = os.open("starts", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(fd, f"{t.id} {t.attempt}\\n".encode())
        os.close(fd)
        if k % 40 == 0:
            time.sleep(0.01)        # the others wait in the pipe
""")

    def producer(self, seed):
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(self.PRODUCER), str(seed)],
            cwd=self.folder, env=clean_environment(PYBGWORKER_DB=str(self.db)))

    def torment(self, chance, seconds):
        workers = [self.worker("--concurrency", 2) for _ in range(2)]
        producers = [self.producer(n) for n in range(2)]
        end = time.monotonic() + seconds
        while time.monotonic() < end or not self.has_done_enough():
            time.sleep(chance.uniform(0.02, 0.2))
            self.watch()
            place = chance.randrange(2)
            how = chance.randrange(5)
            if how == 0:
                producers[place].kill()
                producers[place].wait()
                producers[place] = self.producer(chance.randrange(10**6))
            elif how == 1:
                workers[place].kill()
                workers[place] = self.worker("--concurrency", 2)
            elif how == 2:
                workers[place].signal(signal.SIGSTOP)
                time.sleep(chance.uniform(0.02, 0.3))
                workers[place].signal(signal.SIGCONT)
            else:
                with contextlib.suppress(OSError, IndexError, ValueError):
                    pids = [workers[place].nursery(), *workers[place].children()]
                    os.kill(chance.choice(pids), 9)
        for process in producers:
            process.kill()
            process.wait()
        for worker in workers:
            worker.kill()

    def watch(self):
        """What must hold at any moment, as far as it can be seen from outside."""
        with contextlib.suppress(sqlite3.OperationalError):     # no table yet
            for task_id, *end in self.sql(
                    "select id, state, finished_at, attempt from bg_task "
                    "where state > 3 order by id desc limit 300"):
                self.assertEqual(self.ended.setdefault(task_id, end), end)      # I2, I4
            self.assertEqual(self.sql(
                "select key from bg_task where key is not null and state < 4 "
                "group by key having count(*) > 1"), [])                        # I5

    def has_done_enough(self):
        """Progress, not seconds: a busy machine only takes longer."""
        return len(self.lines("journal")) > 200 and len(self.lines("paces")) > 30

    def of_this_folder(self):
        """Pids of the processes that run in our folder."""
        found = []
        for place in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):
                if os.readlink(place) == str(self.folder) and int(place.parts[2]) != os.getpid():
                    found.append(int(place.parts[2]))
        return found

    def check_paces(self):
        times = sorted(float(line) for line in self.lines("paces"))
        # 40 a second and a burst of 40; a SIGSTOP may hold some up, for a second at most
        for window in (1, times[-1] - times[0]):
            most = 40 * (window + 1) + 40
            for n, at in enumerate(times):
                self.assertLessEqual(sum(t <= at + window for t in times[n:]), most)

    def check_ticks(self):
        ticks = [row[0] for row in self.sql(
            "select tick from bg_task where name = 'tasks.tick' order by tick")]
        first = ticks[0] if ticks else 0
        self.assertEqual(ticks, [first + 60 * n for n in range(len(ticks))])

    def test_whoever_is_killed_whenever_nothing_is_lost_or_done_twice(self):
        seed = int(os.environ.get("PYBGWORKER_SEED", random.randrange(10**6)))
        if not Path("/proc/self/task").exists():
            self.skipTest("needs /proc")
        with self.subTest(f"PYBGWORKER_SEED={seed}"):
            self.ended = {}
            self.torment(random.Random(seed), TORTURE or 4)
            until(lambda: not self.of_this_folder(), 2)                     # I9
            worker = self.worker("--concurrency", 2, "--burst")
            code = worker.wait(300)
            self.assertEqual(code, 0, worker.said())
            until(lambda: not self.of_this_folder(), 2)
            self.watch()

            promised = {int(line) for line in self.lines("journal") if line}
            states = dict(self.sql("select id, state from bg_task"))
            self.assertEqual(promised - states.keys(), set())               # I1
            for name, state in (("tortured", 4), ("paced", 4), ("broken", 5)):
                self.assertEqual(self.sql(                                  # I7
                    "select distinct state from bg_task where name = ?",
                    f"tasks.{name}"), [(state,)])
            self.check_ticks()                                              # I6
            self.check_paces()                                              # I10
            starts = self.lines("starts")
            self.assertEqual(len(starts), len(set(starts)))                 # I3
            attempts = dict(self.sql("select id, attempt from bg_task"))
            for line in starts:
                self.assertLessEqual(int(line.split()[1]), attempts[int(line.split()[0])])
            self.assertEqual(self.sql("pragma integrity_check"), [("ok",)])  # I8
            self.assertLess(self.store.db.wal_bytes(), 64 << 20)
            self.assertEqual(self.sql(
                "select count(*) from bg_payload where id / 8 not in "
                "(select id from bg_task)"), [(0,)])

    def descendants(self, pid):
        """Pids of all that a process has started, and of what those have."""
        found = []
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            for child in map(int, text.split()):
                found += [child, *self.descendants(child)]
        return found

    def shoot(self, chance, worker):
        """Kill a worker, or one that it has started, or both."""
        family = self.descendants(worker.pid)
        if chance.random() < 0.3 and family:        # the others outlive it for longer
            with contextlib.suppress(OSError):
                os.kill(chance.choice(family), signal.SIGSTOP)
        if chance.random() < 0.3 and family:
            with contextlib.suppress(OSError):
                os.kill(chance.choice(family), 9)
        if chance.random() < 0.8:
            worker.kill()

    def test_no_task_that_may_run_once_is_lost_before_it_has_begun(self):
        """Whoever is killed, and whenever: with 200 that wait in pipes."""
        if not Path("/proc/self/task").exists():
            self.skipTest("needs /proc")
        seed = int(os.environ.get("PYBGWORKER_SEED", random.randrange(10**6)))
        self.need_cells()
        chance, end = random.Random(seed), time.monotonic() + TORTURE
        workers = [self.worker("--concurrency", 2) for _ in range(2)]
        shots = 0
        with self.subTest(f"PYBGWORKER_SEED={seed}"):
            while shots < 8 or time.monotonic() < end:
                before = len(self.lines("starts"))
                self.tasks.unrepeated.delay_many([(k,) for k in range(1500)])
                until(lambda: len(self.lines("starts")) > before, 30)   # noqa: B023
                time.sleep(chance.uniform(0, 0.1))
                place = shots % 2
                self.shoot(chance, workers[place])
                if workers[place].process.poll() is not None:
                    workers[place] = self.worker("--concurrency", 2)
                shots += 1
            for worker in workers:
                worker.kill()
            worker = self.worker("--concurrency", 2, "--burst")
            self.assertEqual(worker.wait(300), 0, worker.said())

            starts = self.lines("starts")
            self.assertEqual(len(starts), len(set(starts)))                 # I3
            begun = {int(line.split()[0]) for line in starts}
            rows = dict(self.sql("select id, state from bg_task where name = 'tasks.unrepeated'"))
            self.assertEqual(set(rows.values()) - {4, 5}, set())
            failed = {number for number, state in rows.items() if state == 5}
            self.assertEqual({n for n, state in rows.items() if state == 4} - begun, set())
            # Each child that died may have been about to write its line: two that
            # work, and one in the place of one of them.
            self.assertLessEqual(len(failed - begun), 3 * shots)
            self.assertEqual(self.sql(
                "select distinct attempt - forgiven from bg_task "
                "where name = 'tasks.unrepeated'"), [(1,)])
            self.assertEqual(list(self.folder.glob("queue.db-begun-*")), [])

    def copied(self):
        """Database and log, as another process finds them now."""
        code = ("import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2]); "
                "shutil.copy(sys.argv[1] + '-wal', sys.argv[2] + '-wal')")
        cut = self.folder / "cut.db"
        subprocess.run([sys.executable, "-c", code, str(self.db), str(cut)], check=True)
        return cut.read_bytes(), Path(f"{cut}-wal").read_bytes()

    def surviving(self, data, log):
        """Ids in a database that is left with this content; it must be sound."""
        cut = self.folder / "cut.db"
        cut.write_bytes(data)
        Path(f"{cut}-wal").write_bytes(log)
        Path(f"{cut}-shm").unlink(missing_ok=True)
        connection = sqlite3.connect(cut)
        try:
            check = connection.execute("pragma integrity_check").fetchone()
            self.assertEqual(check, ("ok",))
            if not connection.execute("select 1 from sqlite_master").fetchone():
                return []
            return [row[0] for row in connection.execute("select id from bg_task")]
        finally:
            connection.close()

    def noise(self, chance):
        return bytes(chance.randrange(256) for _ in range(chance.randrange(300)))

    def test_a_power_cut_leaves_a_prefix_of_history(self):
        """The log is cut anywhere, and noise follows the cut."""
        self.store.data_version()
        sizes = {}
        for _ in range(25):
            number = self.app.send("t", "x" * random.randrange(900)).id
            sizes[number] = self.store.db.wal_bytes()
        data, log = self.copied()
        chance = random.Random(5)
        for _ in range(60):
            size = chance.randrange(len(log))
            ids = self.surviving(data, log[:size] + self.noise(chance))
            self.assertEqual(ids, list(range(1, len(ids) + 1)))
            durable = [n for n, end in sizes.items() if end <= size]
            self.assertGreaterEqual(len(ids), len(durable))

    def test_a_power_cut_at_any_moment_keeps_what_was_acknowledged(self):
        """Eight threads and two processes enqueue meanwhile."""
        code = """
            import os, threading, pybgworker as p
            app = p.App()
            journal = os.open("journal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            def produce():
                while True:
                    os.write(journal, f"{app.send('t').id}\\n".encode())
            for _ in range(8):
                threading.Thread(target=produce).start()
        """
        producers = [subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code)], cwd=self.folder,
            env=clean_environment(PYBGWORKER_DB=str(self.db))) for _ in range(2)]
        try:
            self.wait_lines("journal", 50)
            chance, end = random.Random(), time.monotonic() + min(TORTURE, 60)
            rounds = 0
            while rounds < 6 or time.monotonic() < end:
                rounds += 1
                time.sleep(chance.uniform(0, 0.05))
                acknowledged = {int(line) for line in self.lines("journal")[:-1]}
                data, log = self.copied()
                ids = self.surviving(data, log + self.noise(chance))
                self.assertEqual(acknowledged - set(ids), set())
                ids = self.surviving(data, log[:chance.randrange(len(log))])
                self.assertEqual(ids, list(range(1, len(ids) + 1)))
        finally:
            for producer in producers:
                producer.kill()
                producer.wait()

    def test_delay_returns_after_the_log_is_on_disk(self):
        code = """
            import os, pybgworker as p
            app = p.App(); app.send("t"); os.write(2, b"MARK"); app.send("t")
            os.write(2, b"MARK")
        """
        lines = self.strace(code, "pwrite64,fdatasync,fsync,write", "-f")
        marks = [n for n, line in enumerate(lines) if '"MARK"' in line]
        calls = [line for line in lines[slice(*marks)] if "queue.db-wal" in line]
        self.assertTrue(any("pwrite64" in call for call in calls))
        self.assertIn("sync(", calls[-1])

    def strace(self, code, calls, *options):
        """Run a program under strace; return the lines of its trace."""
        if not shutil.which("strace"):
            self.skipTest("needs strace")
        trace = self.folder / "trace"
        done = subprocess.run(
            ["strace", *options, "-y", "-o", str(trace), "-e", f"trace={calls}",
             sys.executable, "-c", textwrap.dedent(code)], cwd=self.folder,
            env=clean_environment(PYBGWORKER_DB=str(self.db)),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if "ptrace" in done.stderr:
            self.skipTest("strace does not work here")
        self.assertEqual(done.returncode, 0, done.stderr)
        return trace.read_text().splitlines()

    def test_only_a_turn_that_finishes_something_waits_for_the_disk(self):
        code = """
            import os, signal, sys, time
            sys.path.insert(0, ".")
            import pybgworker as p, tasks
            signal.alarm(40)
            p.configure(heartbeat_interval=100, worker_timeout=300)
            app = p.default_app
            worker = p.Worker(p.Registry.of(app, "tasks"), app.settings, app.store,
                              log=p.Log(os.open("log", 66)))
            def turn():
                heard = worker.wait()
                worker.step(p.now_ms(), heard)
            def mark(text):
                os.write(2, text)
            worker.start()
            while not worker.is_ready:
                turn()
            result = tasks.nap.delay(0.5)
            mark(b"CLAIM")
            while result.status == "queued":
                turn()
            mark(b"IDLE")
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                turn()
            mark(b"FINISH")
            while not result.ready():
                turn()
            mark(b"END")
            worker.stop()
        """
        lines = self.strace(code, "fdatasync,fsync,write,pwrite64")
        marks = {name: next(n for n, line in enumerate(lines) if f'"{name}"' in line)
                 for name in ("CLAIM", "IDLE", "FINISH", "END")}

        def syncs(start, end):
            return [line for line in lines[marks[start]:marks[end]] if "sync(" in line]

        written = [line for line in lines[marks["CLAIM"]:marks["IDLE"]]
                   if "pwrite64" in line and "-wal" in line]
        self.assertTrue(written)                            # the claim is committed …
        self.assertEqual(syncs("CLAIM", "IDLE"), [])        # … and not waited for
        self.assertEqual(syncs("IDLE", "FINISH"), [])
        finish = [line for line in lines[marks["FINISH"]:marks["END"]] if "-wal" in line]
        self.assertIn("sync(", finish[-1])                  # before anybody sees it

    def test_a_task_costs_the_worker_few_system_calls(self):
        code = """
            import sys
            sys.path.insert(0, ".")
            import pybgworker as p, tasks
            tasks.add.delay_many([(1, 2)] * int(sys.argv[1]))
            sys.exit(p.main(["run", "--app", "tasks", "--burst", "--concurrency", "2"]))
        """
        over = []
        for _ in range(3):      # a stall has all that waits in a pipe taken back, once
            few, many = (
                collections.Counter(
                    line.split("(")[0] for line in self.strace(
                        code.replace("sys.argv[1]", str(n)), "all"))
                for n in (200, 2200))
            many.subtract(few)
            turns = many["epoll_wait"]      # a busy machine has more, smaller ones
            if sum(many.values()) < 2.4 * 2000 + 40 * turns:
                return
            over.append(many)
        self.fail(over)

    def test_ten_thousand_tasks_with_crashes_and_timeouts_leave_nothing_behind(self):
        if not Path("/proc/self/task").exists():
            self.skipTest("needs /proc")
        worker = self.worker("--concurrency", 2)
        bad = 60 if TORTURE else 12

        def all_done():
            return self.sql("select count(*) from bg_task where state < 4") == [(0,)]

        def at_rest():
            """Descriptors, processes, bytes of memory."""
            until(all_done, 120)
            until(lambda: len(worker.children()) == 3)      # 2, and a warm one
            return (sum(len(list(Path(f"/proc/{pid}/fd").iterdir()))
                        for pid in (worker.pid, worker.nursery())),
                    len(worker.children()), pybgworker.memory_bytes(worker.pid))

        def load(count):
            for n in range(count):
                self.tasks.die.delay(("exit", "segfault", "kill")[n % 3])
                self.tasks.clean_up.delay()
            self.tasks.add.delay_many([(1, n) for n in range(5000 - 2 * count)])

        load(4)
        fds, processes, memory = at_rest()
        load(bad)
        # SQLite keeps one descriptor of a closed helper connection for the next.
        until(lambda: at_rest()[0] <= fds + 1 and at_rest()[1] == processes)
        self.assertLess(at_rest()[2] - memory, 4 << 20)
        states = dict(self.sql("""select state, count(*) from bg_task
            where name != 'tasks.tick' group by state"""))      # a minute may begin
        self.assertEqual(states, {pybgworker.SUCCESS: 10_000 - 2 * (bad + 4),
                                  pybgworker.FAILED: 2 * (bad + 4)})
        self.tasks.add.delay(1, 2).get(timeout=10)          # a new log begins
        until(lambda: self.store.db.wal_bytes() <= pybgworker.CALLER_CHECKPOINT_BYTES + (4 << 20))


# == The README ===============================================================


class Readme(Case):

    def setUp(self):
        super().setUp()
        self.text = (HERE / "README.md").read_text(encoding="utf-8")
        shutil.copy(HERE / "pybgworker.py", self.folder)

    def blocks(self, language):
        return re.findall(rf"(?ms)^```{language}\n(.*?)^```", self.text)

    def test_every_setting_command_event_and_public_name_is_in_it(self):
        names = ["PYBGWORKER_" + s.name.upper() for s in pybgworker.SETTINGS]
        names += [f"`{command.name}" for command in pybgworker.COMMANDS]
        for event, (fields, meaning) in pybgworker.EVENTS.items():
            fields = ", ".join(f"`{field}`" for field in fields.split())
            names.append(f"| `{event}` | {fields} | {meaning} |")
        names += [f"`{state}`" for state in pybgworker.STATE_NAMES]
        names += [f"`{option}`" for option in
                  (*pybgworker.TASK_OPTIONS, *pybgworker.CALL_OPTIONS)]
        names += pybgworker.__all__
        for name in names:
            with self.subTest(name):
                self.assertTrue(name in self.text, "not in README.md")

    def test_every_flag_that_it_names_is_one(self):
        known = {"--init", "--preload"}         # of docker, of web servers
        for command in pybgworker.COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()) as out, \
                    self.assertRaises(SystemExit):
                pybgworker.main([command.name, "--help"])
            known.update(re.findall(r"--[a-z-]+", out.getvalue()))
        text = self.text.replace("|---", "")
        self.assertEqual(set(re.findall(r"--[a-z-]+", text)) - known, set())

    def test_its_lines_are_short_and_its_links_lead_somewhere(self):
        long = [line for line in self.text.splitlines()
                if len(line) > 100 and not line.startswith("|")]
        self.assertEqual(long, [])
        headings = re.findall(r"(?m)^##+ (.*)$", self.text)
        places = {re.sub(r"[^a-z -]", "", h.lower()).replace(" ", "-") for h in headings}
        links = set(re.findall(r"\]\(#(.*?)\)", self.text))
        self.assertEqual(links - places, set())

    def test_the_first_screen_prints_what_it_shows(self):
        """`...` is what is left out; numbers, names and paths are the machine's."""
        (self.folder / "tasks.py").write_text(self.blocks("python")[0])
        environ = clean_environment(PYTHONPATH="", PYBGWORKER_CONCURRENCY="2")
        parts = re.split(r"(?m)^\$ python ", self.blocks("console")[0])[1:]
        self.assertEqual(len(parts), 3)
        for part in parts:
            command, _, shown = part.partition("\n")
            argv = command.split()
            argv += ["--log-format", "text"] if "run" in argv else []   # a terminal's
            done = subprocess.run([sys.executable, *argv], cwd=self.folder, env=environ,
                                  text=True, stdout=subprocess.PIPE, check=True)
            pattern = re.sub(r"\d\d+", r"\\d+", re.escape(shown))
            pattern = re.sub(r'(worker|db)="[^"]*"', r'\1="[^"]*"', pattern)
            pattern = pattern.replace(re.escape("..."), ".*")
            with self.subTest(command):
                self.assertRegex(done.stdout, f"(?s)\\A{pattern}\\Z")

    def test_every_python_block_runs(self):
        for number, block in enumerate(self.blocks("python")):
            (self.folder / f"block{number}.py").write_text(block)
            done = subprocess.run(
                [sys.executable, f"block{number}.py"], cwd=self.folder, text=True,
                env=clean_environment(PYTHONPATH=""), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, timeout=60)
            with self.subTest(block[:50]):
                self.assertEqual(done.returncode, 0, done.stdout)

    def test_every_command_line_runs(self):
        """In the README's order, on its first example; endless ones with an end."""
        (self.folder / "tasks.py").write_text(self.blocks("python")[0])
        environ = clean_environment(PYTHONPATH="")
        lines = re.findall(r"(?m)^(?:\$ )?python (.*)$",
                           "\n".join(self.blocks("(?:sh|console)")))
        self.assertGreater(len(lines), 18)
        shlex = pybgworker.importlib.import_module("shlex")
        for line in lines:
            argv = shlex.split(line.split("  #")[0])
            argv += ["--burst"] if "run" in argv and "--burst" not in argv else []
            argv += ["--tasks", "100"] if "bench" in argv else []
            done = subprocess.run(
                [sys.executable, *argv], cwd=self.folder, env=environ, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
            absent = {"42", "43", "--failed"} & set(argv) or argv[1:2] in (
                ["resume"], ["health"])         # no worker runs
            with self.subTest(line):
                self.assertIn(done.returncode, (0, 1) if absent else (0,), done.stderr)
                self.assertNotIn("Traceback", done.stderr)

    def test_the_example_prints_its_table(self):
        shutil.copy(HERE / "example.py", self.folder)
        done = subprocess.run([sys.executable, "example.py"], cwd=self.folder, text=True,
                              env=clean_environment(PYTHONPATH=""), timeout=60,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertEqual(done.returncode, 0, done.stdout)
        rows = {line.split("  ")[0].strip(): line for line in done.stdout.splitlines()}
        self.assertIn("42.00 at attempt 3", rows["fetch_prices"])
        self.assertIn("SIGSEGV", rows["crash"])
        self.assertIn("success", rows["words example.py"])
        self.assertEqual(sorted(p.name for p in self.folder.iterdir()
                                if p.name != "__pycache__"), ["example.py", "pybgworker.py"])


# == The file itself ==========================================================


class TheFile(unittest.TestCase):

    @classmethod
    def setUpClass(cls):
        cls.source = (HERE / "pybgworker.py").read_text(encoding="utf-8")
        cls.lines = cls.source.splitlines()
        cls.tree = ast.parse(cls.source)
        cls.banners = [(number, line.strip("#= ")) for number, line
                       in enumerate(cls.lines, 1) if line.startswith("# == ")]

    def section_of(self, number):
        return [name for start, name in self.banners if start <= number][-1:] or ["head"]

    def test_the_map_is_the_list_of_banners(self):
        """In books, each with a banner of its own."""
        text = pybgworker.__doc__.split("Map\n")[1].split("\n\n")[0]
        books = re.split(r"(?m)^    (?=\S)", text)[1:]
        titles = [book.splitlines()[0] for book in books]
        found = [self.lines[n].strip("# ") for n in range(1, len(self.lines))
                 if self.lines[n - 1] == "#" * 79 and self.lines[n] != "#" * 79
                 and "".join(self.lines[n + 1:n + 3]).count("#" * 79)]
        self.assertEqual([title.upper() for title in titles], found)
        names = " · ".join(" ".join(book.splitlines()[1:]) for book in books)
        self.assertEqual(re.sub(r"\s+", " ", names).strip().split(" · "),
                         [name for _, name in self.banners])

    def rooms(self):
        """The number of the line with which the rooms begin."""
        return self.lines.index("# ROOMS") + 1

    def test_the_core_runs_alone(self):
        """Cut at the banner of the rooms, it still enqueues and runs a task."""
        with tempfile.TemporaryDirectory() as folder:
            core = self.lines[:self.rooms() - 2]
            Path(folder, "pybgworker.py").write_text("\n".join(core) + textwrap.dedent("""

                if __name__ == "__main__":
                    sys.exit(importlib.import_module("pybgworker").main())
                """), encoding="utf-8")
            Path(folder, "app.py").write_text(textwrap.dedent("""
                from pybgworker import task

                @task
                def add(a, b):
                    return a + b

                if __name__ == "__main__":
                    result = add.delay(1, 2)
                    import subprocess, sys
                    subprocess.check_call([sys.executable, "-m", "pybgworker", "run",
                                           "--app", "app", "--burst"], stdout=2)
                    print(result.get(timeout=0))
                """))
            done = subprocess.run([sys.executable, "app.py"], cwd=folder, text=True,
                                  env=clean_environment(PYTHONPATH=""),
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            self.assertEqual(done.stdout, "3\n", done.stderr)

    # One-line methods of App that call a room.
    DOORS = {"cron", "on"}

    def test_only_doors_lead_from_the_core_to_a_room(self):
        rooms = {name for node in self.tree.body if node.lineno > self.rooms()
                 for name in self.names_of(node)}
        for node in self.tree.body:
            if node.lineno > self.rooms():
                break
            own = {name for inner in ast.walk(node) for name in self.bound_by(inner)}
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name) and inner.id in rooms - own \
                        and isinstance(inner.ctx, ast.Load):
                    door = next((f for f in ast.walk(node) if isinstance(
                        f, ast.FunctionDef) and f.lineno <= inner.lineno <= f.end_lineno
                        and f.name in self.DOORS), None)
                    self.assertIsNotNone(door, f"line {inner.lineno}: {inner.id}")
                    self.assertLessEqual(len(door.body), 2, door.name)  # and its doc

    def bound_by(self, node):
        """Names that are of the statement itself, whatever a room calls so, too."""
        if isinstance(node, ast.arg):
            return [node.arg]
        is_bound = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        return [node.id] if is_bound else []

    def test_the_tests_stand_in_the_same_order(self):
        found = re.findall(r"(?m)^# == (.+?) =+$", Path(__file__).read_text("utf-8"))
        order = ["Tools", "Promises", *(name for _, name in self.banners),
                 "Any sequence", "Torture", "The README", "The file itself",
                 "Running"]
        self.assertEqual(found, [name for name in order if name in found])

    def test_banners_reach_column_79_and_say_what_they_own(self):
        for number, name in self.banners:
            self.assertEqual(len(self.lines[number - 1]), 79, name)
            self.assertTrue(self.lines[number].startswith("# "), name)

    def test_every_function_that_the_docstring_names_exists(self):
        for name in re.findall(r"`([A-Za-z_.]+)`", pybgworker.__doc__):
            with self.subTest(name):
                found = pybgworker
                for part in name.split("."):
                    found = getattr(found, part)

    def test_an_underscore_is_for_one_section(self):
        homes = {name: self.section_of(node.lineno) for node in self.tree.body
                 for name in self.names_of(node)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id[0] == "_" and node.id[:2] != "__":
                home = homes.get(node.id, self.section_of(node.lineno))
                self.assertEqual(home, self.section_of(node.lineno), node.id)

    def test_a_private_attribute_is_for_one_section(self):
        """But for what a class inherits."""
        homes: dict = {}
        for node in ast.walk(self.tree):
            here = self.section_of(getattr(node, "lineno", 0))[0]
            if isinstance(node, ast.ClassDef):
                for name in [name for part in node.body for name in self.names_of(part)]:
                    homes.setdefault(name, set()).add(here)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                homes.setdefault(node.attr, set()).add(here)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute) and node.attr in homes \
                    and re.match("_[a-z]", node.attr) \
                    and getattr(node.value, "id", "") not in ("self", "cls", "_thread") \
                    and node.attr != "_replace":        # of named tuples
                here, = self.section_of(node.lineno)
                self.assertIn(here, homes[node.attr], f"{node.lineno}: {node.attr}")

    def names_of(self, node):
        """What a statement of the module defines."""
        if hasattr(node, "name"):
            return [node.name]
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        return [name.id for target in targets if target for name in ast.walk(target)
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)]

    def test_no_section_takes_a_name_that_another_has(self):
        """The later one would hold in both."""
        homes: dict = {}
        for node in self.tree.body:
            plain = isinstance(node, ast.Assign) and all(
                isinstance(target, (ast.Name, ast.Tuple)) for target in node.targets)
            if plain or isinstance(node, ast.AnnAssign) or hasattr(node, "name"):
                for name in self.names_of(node):
                    self.assertNotIn(name, homes, f"line {node.lineno}")
                    homes[name] = node.lineno

    @unittest.skipIf(sys.version_info < (3, 10), "its symtable counts annotations")
    def test_no_section_uses_one_below(self):
        defined = {}
        for node in self.tree.body:
            defined.update(dict.fromkeys(self.names_of(node),
                                         self.section_of(node.lineno)[0]))
        order = ["head"] + [name for _, name in self.banners]
        symtable = pybgworker.importlib.import_module("symtable")

        def check(table):
            here = self.section_of(table.get_lineno())[0]
            for symbol in table.get_symbols():
                home = defined.get(symbol.get_name(), here)
                if table.get_name() in self.DOORS:
                    continue
                if symbol.is_global() and order.index(home) > order.index(here):
                    self.fail(f"{here}, line {table.get_lineno()}: uses "
                              f"{symbol.get_name()}, which is below it, in {home}")
            for child in table.get_children():
                check(child)

        for child in symtable.symtable(self.source, "pybgworker.py", "exec").get_children():
            check(child)

    # What is larger than the rule still, and how large at most.  The list only
    # shrinks: who makes one of these keep the rule takes it out.
    LARGER = {
    }

    def test_sections_classes_and_functions_have_their_sizes(self):
        ends = [number for number, _ in self.banners[1:]] + [len(self.lines)]
        sizes = {f"section {name}": (end - start, 450)
                 for (start, name), end in zip(self.banners, ends)}
        for node in ast.walk(self.tree):
            size = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.assertLessEqual(size, 45, node.name)
            elif isinstance(node, ast.ClassDef):
                born, given = self.attributes_of(node)
                sizes[f"class {node.name}"] = size, 250
                sizes[f"attributes of {node.name}"] = len(born | given), 15
                sizes[f"born late in {node.name}"] = len(given - born), 0
        larger = {what: size for what, (size, limit) in sizes.items() if size > limit}
        self.assertEqual(sorted(larger), sorted(self.LARGER))
        for what, size in larger.items():
            self.assertLessEqual(size, self.LARGER[what], what)

    def attributes_of(self, node):
        """Those a class names in its body, or its __init__; and all it ever sets."""
        born = {name for part in node.body if isinstance(part, (ast.Assign, ast.AnnAssign))
                for name in self.names_of(part)}
        given, first = set(), set()
        for method in node.body:
            found = {part.attr for part in ast.walk(method)
                     if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                     and isinstance(part.value, ast.Name) and part.value.id == "self"}
            given |= found
            if getattr(method, "name", "") == "__init__":
                first = found
        return first | born & given, given

    def test_sql_is_in_its_sections_only(self):
        allowed = {"Schema", "Database", "Queue", "Claiming", "Attempts", "Live rows",
                   "History", "Endings", "Records", "Lists", "Desk", "Facts",
                   "Timetable", "Register", "Bench"}
        pattern = re.compile(r"(select .* from|insert (or \w+ )?into|update bg_|delete from)",
                             re.S)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) \
                    and pattern.match(node.value.strip()):
                self.assertIn(self.section_of(node.lineno)[0], allowed, node.value)

    def test_only_the_standard_library_is_imported(self):
        for node in ast.walk(self.tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                if hasattr(sys, "stdlib_module_names"):
                    self.assertIn(name.split(".")[0],
                                  sys.stdlib_module_names | {"__future__"})
                self.assertNotIn(name, ("inspect", "queue"))

    def test_lines_fit_and_nothing_is_unfinished(self):
        for number, line in enumerate(self.lines, 1):
            self.assertLessEqual(len(line), 88, f"line {number}")
            self.assertNotRegex(line, r"\b(TODO|FIXME|XXX)\b")

    def test_what_is_public_says_what_it_does(self):
        for name in pybgworker.__all__:
            found = getattr(pybgworker, name)
            self.assertTrue(found.__doc__, name)
            if isinstance(found, type):
                for attribute, value in vars(found).items():
                    if callable(value) and not attribute.startswith("_"):
                        self.assertTrue(value.__doc__, f"{name}.{attribute}")

    def test_clock_and_chance_are_asked_in_few_places(self):
        clock = [self.section_of(n)[0] for n, line in enumerate(self.lines, 1)
                 if re.search(r"\btime\.time(_ns)?\(", line) and "def " not in line]
        self.assertLessEqual(set(clock), {"Time and values", "Bench"})
        calls = {self.section_of(node.lineno)[0] for node in ast.walk(self.tree)
                 if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "now_ms"}
        self.assertEqual(calls, {"Register", "Runs", "Bench"})     # above: store.now()

    def test_every_name_in_all_exists_and_is_sorted(self):
        self.assertEqual(pybgworker.__all__, sorted(pybgworker.__all__))


# == Running ==================================================================
# Many tests wait for something, so several run at a time, each in one of a few
# processes that live as long as the run: -j N, and -j 1 for a debugger.


def units(names):
    """What is run as one: a test, or a class that prepares something for all of its."""
    loader = unittest.defaultTestLoader
    suite = loader.loadTestsFromNames(names or ["__main__"])
    found = []

    def collect(part):
        if isinstance(part, unittest.TestSuite):
            for inner in part:
                collect(inner)
        elif type(part).setUpClass.__func__ is not unittest.TestCase.setUpClass.__func__:
            found.append(type(part).__qualname__)
        else:
            found.append(part.id().partition("__main__.")[2] or part.id())

    collect(suite)
    # The longest first, lest one be left alone at the end.
    return sorted(dict.fromkeys(found), key=lambda name: "Torture" not in name)


def run_unit(name):
    """Run one unit; return (number of tests, [text of each failure], [skipped])."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromName(f"__main__.{name}").run(result)
    failed = {}
    for test, text in result.failures + result.errors:
        failed.setdefault(test.id().split(" ")[0], f"FAIL: {test}\n{text}")
    failed.update((test.id(), f"FAIL: {test}: it should fail, and does not")
                  for test in result.unexpectedSuccesses)
    skipped = [f"{test}: {why}" for test, why in result.skipped]
    return result.testsRun, list(failed.values()), skipped


def serve_units():
    """Run each unit that a line of standard input names; answer with a line of JSON."""
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    for line in commands:
        print(json.dumps(run_unit(line.strip())), file=answers, flush=True)


class TestProcess:
    """A process that runs units one after the other."""

    def __init__(self):
        self.process = None

    def run(self, name):
        """Run a unit there.  One that ends the process has failed."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--serve"], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        print(name, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        code, self.process = self.process.wait(), None
        return 1, [f"FAIL: {name}: its process ended with status {code}"], []

    def close(self):
        if self.process is not None:
            self.process.communicate()


def run_side_by_side(queue, jobs, report):
    """Run the units, so many at a time; `report` each result."""
    def serve():
        process = TestProcess()
        with contextlib.suppress(IndexError):
            while True:
                report(process.run(queue.popleft()))
        process.close()

    threads = [threading.Thread(target=serve) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def run_all(argv):
    """Run what is named, or everything; close with one line that counts."""
    jobs = 2 * (os.cpu_count() or 1)
    if argv[:1] == ["-j"]:
        jobs, argv = int(argv[1]), argv[2:]
    queue = collections.deque(units([f"__main__.{name}" for name in argv]))
    total, failed, skipped = 0, [], []

    def report(result):
        nonlocal total
        total += result[0]
        failed.extend(result[1])
        skipped.extend(result[2])
        print("\n" + "\n".join(result[1]) if result[1] else ".", end="", flush=True)

    began = time.monotonic()
    if jobs > 1 and len(queue) > 1:
        run_side_by_side(queue, jobs, report)
    else:
        for name in queue:
            report(run_unit(name))
    print(f"\nRan {total} tests in {time.monotonic() - began:.1f} s")
    for text in skipped:
        print(f"skipped: {text}")
    passed = total - len(failed) - len(skipped)
    print(f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(serve_units() if sys.argv[1:] == ["--serve"] else run_all(sys.argv[1:]))
