"""Background tasks for Python programs, kept in one SQLite file.

    # tasks.py
    from pybgworker import task

    @task
    def add(a, b):
        return a + b

    if __name__ == "__main__":
        result = add.delay(1, 2)            # durable once this returns
        print(result.get(timeout=60))       # 3, as soon as a worker runs:
        # $ python pybgworker.py run --app tasks

Copy this file into a project; it needs CPython 3.9 or newer and nothing else.

Life of a task
    caller ── delay() ──► database file ◄── worker ◄══ runs, answers ══► child 1..N
                                              ║                            ▲ fork
                                              ╚══ births, deaths ══► nursery, the app

    `Task.delay` encodes the arguments and calls `Store.enqueue`: one committed
    row, *queued* (or *scheduled*, when it has to wait for its time), and one
    datagram that wakes a sleeping worker.  The worker is a single thread around
    `Worker.step`: it hears its children, and `settle` decides what follows each
    run: success, failure, or another run after `retry_delay`.  `Store.turn`
    writes that, where the run is still ours, with the rows of what follows, such
    as a call of on_failure, and claims what comes next, in one transaction.
    `Pool.dispatch` hands the claimed runs to children that are warm.

    The worker never imports the app.  One other process does, the nursery
    (`run_nursery`), and forks the children; where that is not safe it executes
    them (`run_child`), and each imports the app.  A child runs ordinary tasks one
    at a time in its `MainThread`, or several in `Threads`, and beside them those
    that are `async def`, as `Coroutines` of one event loop; it answers each with
    one message.  `AsyncResult.get` reads the outcome.

    Who ends a child costs itself a run, and no other: of several in flight each
    runs again by itself, see `judge`.  The tasks of a killed worker are found by
    `Store.reap`; what had begun, by the cells of `Begun`, has cost an attempt.

Map
    Book One: the program's side
        Settings · States and errors · Time and values · Retry and rate · Rows ·
        Run counts · People · Printed · Evidence · Store · Functions · Waiting ·
        Results · Tasks · App
    Book Two: the queue in SQLite
        Wake-up · Files · Guards · Open files · Forks · Schema · Database ·
        Group commit · Queue · Picking · Claiming · Attempts · Live rows · History ·
        Endings · Records · Lists · Desk · Timetable · Facts · Register
    Book Three: the worker
        Importing · Registry · Processes · Memory · Channels · Fork safety · Wire ·
        Begun · Output · Log lines · Surroundings · Interrupts · Runs · Main thread ·
        Threads · Carried runs · Coroutines · Child · Nursery · Births · Load · Member ·
        Hearing · Placement · Crashes · Deaths · Crew · Dispatch · Pool ·
        Liveness · Wishes · Log · Journal · Upkeep · Tally · Settling · Lookout ·
        Senses · Signs · Unserved · Household · Worker · Command line
    Rooms
        Cron · Scheduler · Reports · Reading · Acts · Wording · Reasons · Why ·
        Attention · Logs · Overview · Screen · Frame · Top · Metrics · Health ·
        Listeners · Bench · Old import paths

Guarantees
    A task whose delay() returned is not lost, whatever is killed; with the
    default durability not by a power cut either.  It runs at least once, it
    finishes exactly once, and a final state never changes except by an explicit
    retry.  A cron tick is enqueued once, with any number of workers.

Every `*_at` in this file is unix time in integer milliseconds; a bare number is
in seconds; any other unit is in the name.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]

if __name__ == "__main__" \
        and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    # Until main() begins, Ctrl-C ends a command without a traceback.
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import _socket
import _thread
import atexit
import base64
import bisect
import codecs
import collections
import contextlib
import contextvars
import copyreg
import enum
import errno
import functools
import heapq
import importlib
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import random
import re
import select
import selectors
import signal
import socket
import sqlite3
import stat
import struct
import sys
import threading
import time
import types
import weakref
import zlib
from collections.abc import (
    Container, Coroutine, Generator, Iterable, Iterator, Sequence,
)
from datetime import date, datetime, timedelta, timezone
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any, Callable, Generic, NamedTuple, Protocol, TypeVar, overload

__version__ = "2.0.0"
__all__ = [
    "Abort", "App", "AppError", "AsyncResult", "Cron", "CronError", "DatabaseBusy",
    "DatabaseUnavailable", "DatabaseUnusable", "OptionError", "PayloadTooLarge",
    "PayloadTypeError", "PyBgWorkerError", "Retry", "SettingError", "TaskCancelled",
    "TaskEvent", "TaskFailed", "TaskNotFound", "TaskStateError", "TaskTimeout",
    "WaitTimeout", "configure", "cron", "current_task", "main", "on", "task",
]


###############################################################################
# BOOK ONE: THE PROGRAM'S SIDE
###############################################################################

# == Settings =================================================================
# Owns every setting: its name, default, unit and meaning.  A setting `x` is the
# variable PYBGWORKER_X, the keyword x of configure() and App(), and --x of `run`
# where that makes sense.  Flag beats environment beats code beats default.
# Values are checked here, once, and passed down; nothing else reads os.environ.
# What options of tasks and calls have in common with settings is checked here too.


class PyBgWorkerError(Exception):
    """The base of every error this module raises on purpose."""

    def __reduce__(self):
        """Pickled and copied as it is: its __init__ may want other arguments."""
        new = copyreg.__newobj__            # type: ignore[attr-defined]
        return new, (type(self), *self.args), self.__dict__


class SettingError(PyBgWorkerError, ValueError):
    """A setting has a value it cannot have.  The message says what is allowed."""


class OptionError(PyBgWorkerError, ValueError, TypeError):
    """An option or an argument has a value it cannot have.  Nothing was changed."""


_UNIT_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_UNIT_BYTES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}

LONGEST_SECONDS = 10**9     # of any span, 31 years; a timer of the system takes 292
LARGEST = 10**11            # of any other number
MOST_CHILDREN = 1000        # of one worker: 2 GB if forked, else 20, to do nothing
_MOST_THREADS = 1000        # of one child
_MOST_COROUTINES = 100_000  # … a loop is busy with a tenth of that
_LEAST_MEMORY = 1 << 20     # of a child: whoever writes 512 means MiB
_LARGEST_PAYLOAD = 900 << 20        # SQLite takes no text beyond 10**9 bytes
_NOT_IN_NAMES = re.compile("[\0\ud800-\udfff]")    # SQLite cuts there, or refuses


def parse_path(value):
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) \
            or "\0" in str(value) or str(value) == ":memory:" \
            or str(value).startswith("file:"):
        raise ValueError("the path of a file, which workers can open as well")
    return os.fspath(value)


def parse_name(value):
    if not isinstance(value, str) or not 0 < len(value) <= 200 \
            or _NOT_IN_NAMES.search(value):
        raise ValueError("a text of 1 to 200 characters, no NUL or lone surrogate")
    return value


def parse_queue_name(value):
    if "," in parse_name(value) or value != value.strip():
        raise ValueError("a name without a comma, or spaces around it")
    return value


def parse_count(value, most=10**9, what="a whole number from 1 up"):
    if not re.fullmatch(r"\d{1,9}", str(value)) or not 1 <= int(value) <= most:
        raise ValueError(what)
    return int(value)


def _count_to(most):
    what = f"a whole number from 1 to {most:,}"
    return functools.partial(parse_count, most=most, what=what)


parse_children = _count_to(MOST_CHILDREN)


def _amount(value, units):
    """What a number, or a text of one and perhaps a unit, stands for; else nan."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e18 else math.nan
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,30})?)([a-z]?)", str(value))
    unit = units.get(found[2], math.nan) if found else math.nan
    return float(found[1]) * unit if found else math.nan


def _seconds(value):
    """Parse `2.5`, `"90s"`, `"15m"`, `"12h"` or `"7d"` into seconds above 0."""
    number = _amount(value, _UNIT_SECONDS)
    if not 0 < number <= LONGEST_SECONDS:
        raise ValueError(
            "seconds above 0, or a number with s, m, h, d or w; at most 31 years"
        )
    return number


def parse_grace(value):
    return 0.0 if _amount(value, _UNIT_SECONDS) == 0 else _seconds(value)


def _retention(value):
    """Seconds; infinite for `"forever"`: None would mean that nothing was said."""
    return math.inf if value in ("forever", math.inf) else parse_grace(value)


def parse_bytes(value):
    """Parse `1048576`, `"512k"`, `"64m"` or `"2g"` into bytes above 0."""
    found = re.fullmatch(r"(\d{1,15})([kmg]?)b?", str(value).lower())
    number = int(found[1]) * _UNIT_BYTES[found[2]] if found else 0
    if number <= 0:
        raise ValueError("bytes above 0, or a number with k, m or g")
    return number


def _memory(value):
    if parse_bytes(value) < _LEAST_MEMORY:
        raise ValueError("at least 1m: bytes, or a number with k, m or g")
    return parse_bytes(value)


def _payload_bytes(value):
    if parse_bytes(value) > _LARGEST_PAYLOAD:
        raise ValueError("at most 900m, for SQLite holds no longer text")
    return parse_bytes(value)


def _names(value):
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    values = value if isinstance(value, Iterable) else ()
    names = tuple(parse_queue_name(name) for name in values)
    if not names:
        raise ValueError("queue names with commas between them, or a list of them")
    return names


def _log_level(value):
    if str(value).upper() not in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        raise ValueError("debug, info, warning, error or critical")
    return str(value).upper()


def parse_listen(value):
    """Return `"127.0.0.1:8080"` for `8080`; `"0.0.0.0:8080"`, `"[::1]:8080"` as is."""
    found = re.fullmatch(
        r"(?:(\[[0-9a-fA-F:.]+\]|[\w.-]+):)?(\d{1,5})", str(value), re.ASCII)
    if not found or int(found[2]) > 65535:
        raise ValueError("PORT or HOST:PORT, such as 8080, 0.0.0.0:8080, [::1]:8080")
    return f"{found[1] or '127.0.0.1'}:{int(found[2])}"


def _durability(value):
    if value not in ("full", "normal"):
        raise ValueError("full or normal")
    return value


def _start_method(value):
    if value not in ("auto", "fork", "spawn"):
        raise ValueError("auto, fork or spawn")
    return value


def parse_pattern(value):
    """A regular expression as text; an empty one finds nothing."""
    try:
        re.compile(value)
        return str(value)
    except (re.error, RecursionError, OverflowError) as exc:
        raise ValueError(f"a regular expression: {exc}") from None


def parse_token(value):
    if not re.fullmatch("[!-~]{8,200}", str(value)):
        raise ValueError("8 to 200 ASCII characters without spaces")
    return str(value)


def _switch(value):
    if str(value).lower() not in ("0", "1", "true", "false", "yes", "no"):
        raise ValueError("1 or 0")
    return str(value).lower() in ("1", "true", "yes")


def parse_rate(value: float | str) -> float:
    """Return starts per second from `5`, `2.5`, `"5/s"`, `"100/m"` or `"1000/h"`.

    Raises ValueError for anything else, for 0, and for what is not finite.
    """
    number, unit = value, "s"
    if isinstance(value, str) and re.search(r"/[smhd]\Z", value):
        number, unit = value[:-2], value[-1]
    rate = _amount(number, {"": 1}) / _UNIT_SECONDS[unit]
    if not 1e-9 <= rate <= 1e9:
        raise ValueError('starts per second above 0, or "5/s", "100/m", "1000/h"')
    return rate


def checked(option, parse, value):
    """Parse the value of an option as that of a setting is parsed."""
    try:
        return parse(value)
    except (ValueError, TypeError) as exc:
        raise OptionError(f"{option}={value!r}: must be {exc}") from None


def check_number(name, value, least=0, most=LARGEST, kind=(int, float), what=""):
    """Return a number from `least` to `most`.  Raises OptionError for all else."""
    what = what or f"a {'whole ' * (kind is int)}number from {{:,}} to {{:,}}"
    if isinstance(value, bool) or not isinstance(value, kind) \
            or not least <= value <= most:
        raise OptionError(f"{name}={value!r}: must be {what.format(least, most)}")
    return value


def check_span(name, value, least=0, most=LONGEST_SECONDS):
    """Check a number of seconds, or a timedelta; return seconds."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    return check_number(name, seconds, least, most,
                        what="seconds from {:,} to {:,}, or a timedelta")


def check_known(options, known):
    """Raise OptionError for an option that there is not."""
    unknown = options.keys() - known
    if unknown:
        raise OptionError(
            f"unknown option {min(unknown)!r}; there are {', '.join(sorted(known))}"
        )


class Setting(NamedTuple):
    """One row of SETTINGS.  `parse` raises ValueError saying what is allowed."""

    name: str
    default: Any                # None: not set, no limit
    parse: Callable[[Any], Any]
    flag: bool                  # True when `run` has it as a flag
    meaning: str
    may_be_empty: bool = False  # an empty variable is a value, and not that it is unset


SETTINGS = (
    Setting("db", "pybgworker.db", parse_path, True,
            "path of the SQLite file (default: pybgworker.db)"),
    Setting("concurrency", None, parse_children, True,
            "child processes, 1 to 1,000; each runs `threads` ordinary tasks and "
            "`coroutines` async def tasks at once (default: the CPU count)"),
    Setting("threads", 1, _count_to(_MOST_THREADS), True,
            "ordinary tasks that a child runs at once, each in a thread, 1 to 1,000 "
            "(default: 1)"),
    Setting("coroutines", 100, _count_to(_MOST_COROUTINES), True,
            "async def tasks that a child runs at once, on one event loop, 1 to "
            "100,000 (default: 100)"),
    Setting("start_method", "auto", _start_method, True,
            "how children are started: fork, from a process that has imported the app; "
            "spawn, each imports it; auto: fork where it is safe (default: auto)"),
    Setting("queues", None, _names, True,
            "queues to serve, with commas between (default: all)"),
    Setting("rate_limit", None, parse_rate, True,
            "starts over all tasks and workers: 5 (a second), 5/s, 100/m, 1000/h "
            "(default: no limit)"),
    Setting("timeout", None, _seconds, True,
            "time limit of a run whose task has none: seconds, or 90s, 15m, 12h "
            "(default: no limit)"),
    Setting("worker_name", None, parse_name, True,
            "name shown in logs and inspect (default: host-pid)"),
    Setting("heartbeat_interval", 5.0, _seconds, True,
            "seconds between two heartbeats of a worker (default: 5)"),
    Setting("worker_timeout", 15.0, _seconds, True,
            "seconds without a heartbeat until a worker's tasks are taken over "
            "(default: 15)"),
    Setting("shutdown_timeout", 30.0, parse_grace, True,
            "seconds that running tasks may go on after the first signal "
            "(default: 30)"),
    Setting("retention", 604800.0, _retention, True,
            "how long finished tasks are kept: 12h, 7d, forever; a bare number is "
            "seconds (default: 7d)"),
    Setting("retention_failed", 2592000.0, _retention, True,
            "how long failed tasks are kept, in the same way (default: 30d)"),
    Setting("max_tasks_per_child", None, parse_count, True,
            "replace a child after so many tasks (default: never)"),
    Setting("max_memory", None, _memory, True,
            "memory a child may use: 512m, 2g; a bare number is bytes "
            "(default: no limit)"),
    Setting("max_payload", 64 << 20, _payload_bytes, False,
            "bytes of the arguments, or the result, of one task at most, to 900m "
            "(default: 64m)"),
    Setting("log_level", "INFO", _log_level, True,
            "log lines of tasks from this level on are output, where the app does not "
            "configure logging: debug, info, warning, error, critical (default: info)"),
    Setting("http", None, parse_listen, True,
            "[HOST:]PORT on which a worker answers /metrics, /healthz and /readyz; the "
            "host is 127.0.0.1 where none is given (default: it does not)"),
    Setting("durability", "full", _durability, True,
            "full: a power cut loses nothing; normal: it may lose the last moments "
            "(default: full)"),
    Setting("busy_timeout", 30.0, _seconds, False,
            "seconds that a caller waits for a locked database (default: 30)"),
    Setting("allow_network_fs", False, _switch, False,
            "1: open the database on a network file system all the same (default: 0)"),
    Setting("web_token", None, parse_token, False,
            "what one needs to get into the dashboard, and from elsewhere to metrics "
            "(default: a new one at each start; no metrics)"),
    Setting("redact", "(?i)pass|secret|token|api_?key|auth|cookie|credential|private|"
            "card|iban|ssn", parse_pattern, False,
            "regular expression for the names of parameters and keys whose values the "
            "dashboard hides; empty: none (default: passwords, tokens and the like)",
            may_be_empty=True),
)
SETTING_BY_NAME = {setting.name: setting for setting in SETTINGS}


def check_setting(name: str, value: Any, source: str) -> Any:
    """Return the parsed value.  Raises SettingError that names source and value."""
    try:
        return SETTING_BY_NAME[name].parse(value)
    except (ValueError, TypeError) as exc:
        raise SettingError(f"{source}={value!r}: must be {exc}") from None


def resolve_settings(code: dict, environ: dict, flags: dict) -> types.SimpleNamespace:
    """Merge the three sources over the defaults; code and flags are parsed ones."""
    found = types.SimpleNamespace()
    for setting in SETTINGS:
        variable = "PYBGWORKER_" + setting.name.upper()
        if flags.get(setting.name) is not None:
            value = flags[setting.name]
        elif environ.get(variable) or setting.may_be_empty and variable in environ:
            value = check_setting(setting.name, environ[variable], variable)
        elif setting.name in code:
            value = code[setting.name]
        else:
            value = setting.default
        setattr(found, setting.name, value)
    if found.worker_timeout <= found.heartbeat_interval:
        raise SettingError(
            f"worker_timeout={found.worker_timeout:g}: must be above "
            f"heartbeat_interval={found.heartbeat_interval:g}"
        )
    if found.concurrency is None:
        found.concurrency = min(os.cpu_count() or 1, MOST_CHILDREN)
    found.worker_name = found.worker_name or default_worker_name()
    return found


def default_worker_name() -> str:
    """HOST-PID."""
    return f"{socket.gethostname()}-{os.getpid()}"


# == States and errors ========================================================
# Owns the states of a task, the moves between them, and the errors.  A state is
# a small integer in the database and a word everywhere else.

SCHEDULED, RETRYING, QUEUED, RUNNING, SUCCESS, FAILED, CANCELLED = range(7)
STATE_NAMES = (
    "scheduled", "retrying", "queued", "running", "success", "failed", "cancelled",
)
LATER = frozenset({SCHEDULED, RETRYING})    # they wait for their time
WAITING = LATER | {QUEUED}
FINISHED = frozenset({SUCCESS, FAILED, CANCELLED})

# Every move a task can make.  Those out of a finished state are an explicit
# retry; running → queued is a run handed back by a stop, or whose worker died.
MOVES = {
    SCHEDULED: {QUEUED, CANCELLED},
    RETRYING: {QUEUED, CANCELLED},
    QUEUED: {RUNNING, CANCELLED},
    RUNNING: {SUCCESS, FAILED, CANCELLED, RETRYING, QUEUED},
    SUCCESS: {QUEUED},
    FAILED: {QUEUED},
    CANCELLED: {QUEUED},
}


def state_name(state: int) -> str:
    """The word for a state; also for one that somebody wrote by hand."""
    return STATE_NAMES[state] if state in MOVES else f"unknown state {state}"


class Retry(PyBgWorkerError):
    """Raise it in a task to run again, in `countdown` seconds (or a timedelta).

    It spends a retry; without a countdown the task's own delay holds.  `Retry(30)`
    is `Retry(countdown=30)`.  Raises OptionError for what is no time to wait.
    """

    def __init__(self, message: Any = "retry asked for", countdown: Any = None):
        if countdown is None and isinstance(message, (int, float, timedelta)):
            message, countdown = "retry asked for", message
        if countdown is not None:
            countdown = check_span("countdown", countdown, -LONGEST_SECONDS)
        super().__init__(message)
        self.countdown = countdown


class Abort(PyBgWorkerError):
    """Raise it in a task to fail at once, whatever retries are left."""


class TaskTimeout(PyBgWorkerError):
    """Raised inside a task at its time limit; it has a short grace to clean up."""


class TaskCancelled(PyBgWorkerError):
    """get(): the task was cancelled.  Inside a task: it is being cancelled now."""


class TaskError(str):
    """What went wrong in one line, `ValueError: no such user`, with its parts.

    `.kind` is exception, timeout, crash, lost or abort; `.type` the name of the
    exception class, `.message` its text, `.traceback` the Python stack; the last
    three may be empty.
    """

    kind: str
    type: str
    message: str
    traceback: str

    def __new__(cls, found: dict):
        head, message = found.get("type") or found["kind"], found.get("message", "")
        error = super().__new__(cls, f"{head}: {message}" if message else head)
        error.kind = found["kind"]
        error.type = found.get("type", "")
        error.message = message
        error.traceback = found.get("traceback", "")
        return error

    def __getnewargs__(self):
        """Pickled by its parts."""
        return (dict(self.__dict__),)


class TaskFailed(PyBgWorkerError):
    """get(): the task failed for good.  `.error` is the TaskError, `.kind`,
    `.error_type` and `.traceback` are parts of it.
    """

    def __init__(self, task_id: int, error: TaskError):
        self.task_id = task_id
        self.error = error
        self.kind = error.kind
        self.error_type = error.type
        self.traceback = error.traceback
        super().__init__(f"task {task_id} failed: {error}")


class WaitTimeout(PyBgWorkerError, TimeoutError):
    """get(): the task has not finished within the timeout; it goes on."""


class TaskNotFound(PyBgWorkerError, LookupError):
    """No row has this id: it was pruned, or the id is of another database."""


class TaskStateError(PyBgWorkerError):
    """The task is in a state in which this cannot be done, as the message says."""


class PayloadTooLarge(PyBgWorkerError, ValueError):
    """Arguments, or a result, are larger than max_payload."""


class PayloadTypeError(PyBgWorkerError, TypeError):
    """A value that would not arrive as it was sent.  The message has its path."""


class AppError(PyBgWorkerError):
    """The app cannot be loaded or defines something twice."""


class DatabaseUnavailable(PyBgWorkerError):
    """The database cannot be used now.  Nothing was changed by the call; where it is
    about many tasks (purge, retry of all that failed), some may have been.

    `.fatal` is True where waiting cannot help: not a database, corrupt, replaced.
    """

    fatal = False


class DatabaseBusy(DatabaseUnavailable):
    """Somebody else held the database's write lock for all of busy_timeout."""


class DatabaseUnusable(DatabaseUnavailable):
    """The file is not a queue, is damaged, was replaced, or is from the future."""

    fatal = True


# == Time and values ==========================================================
# Owns the clock, and the text form of arguments and results.  What arrives
# equals what was sent, or encode() raises a TypeError; nothing is ever pickled.
# Plain JSON values are themselves; every other type is an object with one key:
#     {"$tuple": [1, 2]}   {"$datetime": "2026-01-02T03:04:05+00:00"}
# and a dict that JSON would change, or that looks like one of those, becomes
# {"$dict": [[key, value], ...]}.


def now_ms() -> int:
    """The wall clock: unix time in integer milliseconds."""
    return time.time_ns() // 1_000_000


def unix_time_of(at: float) -> float:
    """The unix time, in seconds, that a monotonic time has by the wall clock of now."""
    return time.time() + at - time.monotonic()


HOUR_MS, DAY_MS = 3_600_000, 86_400_000


def to_ms(seconds: float) -> int:
    """A duration in seconds as whole milliseconds, never shorter."""
    return math.ceil(seconds * 1000)


def iso_time(at: int) -> str:
    """2026-01-02T03:04:05.678Z"""
    try:
        moment = time.gmtime(at // 1000)
    except (OverflowError, ValueError, OSError):    # written by hand
        return f"{at} ms"
    return time.strftime("%Y-%m-%dT%H:%M:%S.", moment) + f"{at % 1000:03d}Z"


def size_text(count: float) -> str:
    """Bytes for people: 61 MiB, 3.1 GiB."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            size = count / unit
            return f"{size:.0f} {name}" if size >= 10 else f"{size:.1f} {name}"
    return f"{count:.0f} B"


def earliest(a, b):
    """The smaller of two times, of which either may be None for never."""
    return b if a is None else a if b is None else min(a, b)


class _Refused(Exception):
    """A value that has no text form; encode() turns it into a TypeError."""


# A longer integer could trip the interpreter's limit on decimal digits, which a
# program may set as low as 640, here or where it is read.
_LONGEST_DECIMAL_BITS = 2_000
# Two lone surrogates in this order: JSON's escapes would make one character.
_SURROGATE_PAIR = re.compile("(?<=[\ud800-\udbff])(?=[\udc00-\udfff])")


def _pack(value):
    kind = type(value)
    if kind is str:
        if value.isascii() or not _has_pair(value):
            return value
        return {"$str": _SURROGATE_PAIR.split(value)}
    if value is None or kind is bool:
        return value
    packer = _PACKERS.get(kind)
    if packer is None:
        packer = _late_packer(kind)
    return packer(value)


def _has_pair(text):
    try:
        text.encode()           # the fastest way to see that there is no surrogate
    except UnicodeEncodeError:
        return _SURROGATE_PAIR.search(text) is not None
    return False


def _pack_int(value):
    if value.bit_length() < _LONGEST_DECIMAL_BITS:
        return value
    return {"$int": hex(value)}


def _pack_float(value):
    return value if math.isfinite(value) else {"$float": repr(value)}


def _pack_list(value):
    return [_pack(item) for item in value]


def _pack_dict(value):
    for key in value:
        if type(key) is not str or key.startswith("$") \
                or not key.isascii() and _has_pair(key):
            return {"$dict": [[_pack(k), _pack(v)] for k, v in value.items()]}
    return {key: _pack(item) for key, item in value.items()}


def _pack_moment(value):
    """Wall time, then the zone's name or offset, then the fold."""
    zone = value.tzinfo
    wall = value.replace(tzinfo=None, fold=0).isoformat()
    if zone is None:
        return [wall, None, value.fold]
    if type(zone) is timezone:
        return [wall, zone.utcoffset(None) / timedelta(microseconds=1), value.fold]
    if getattr(zone, "key", None) and type(zone).__module__.startswith("zoneinfo"):
        return [wall, zone.key, value.fold]
    raise _Refused


def _unpack_zone(zone):
    if zone is None:
        return None
    if isinstance(zone, str):
        return importlib.import_module("zoneinfo").ZoneInfo(zone)
    return timezone(timedelta(microseconds=zone)) if zone else timezone.utc


def _unpack_moment(kind, body):
    wall, zone, fold = body
    moment = kind.fromisoformat(wall)
    return moment.replace(tzinfo=_unpack_zone(zone), fold=fold)


def _unpack_bytes(text):
    return base64.b64decode(text)


_PACKERS = {
    int: _pack_int,
    float: _pack_float,
    list: _pack_list,
    dict: _pack_dict,
    tuple: lambda v: {"$tuple": _pack_list(v)},
    set: lambda v: {"$set": _pack_list(v)},
    frozenset: lambda v: {"$frozenset": _pack_list(v)},
    bytes: lambda v: {"$bytes": base64.b64encode(v).decode()},
    bytearray: lambda v: {"$bytearray": base64.b64encode(v).decode()},
    complex: lambda v: {"$complex": repr(v)},
    Decimal: lambda v: {"$decimal": str(v)},
    datetime: lambda v: {"$datetime": _pack_moment(v)},
    time_of_day: lambda v: {"$time": _pack_moment(v)},
    date: lambda v: {"$date": v.isoformat()},
    timedelta: lambda v: {"$timedelta": [v.days, v.seconds, v.microseconds]},
}
_UNPACKERS: dict[str, Callable] = {
    "$str": "".join,
    "$int": lambda body: int(body, 16),
    "$float": float,
    "$dict": dict,
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$bytes": _unpack_bytes,
    "$bytearray": lambda body: bytearray(_unpack_bytes(body)),
    "$complex": complex,
    "$decimal": Decimal,
    "$datetime": lambda body: _unpack_moment(datetime, body),
    "$time": lambda body: _unpack_moment(time_of_day, body),
    "$date": date.fromisoformat,
    "$timedelta": lambda body: timedelta(*body),
    "$uuid": lambda body: importlib.import_module("uuid").UUID(body),
}


def _late_packer(kind):
    """UUID, without importing uuid into every program that has none."""
    if kind.__module__ == "uuid" and kind.__name__ == "UUID":
        packer = _PACKERS[kind] = lambda v: {"$uuid": str(v)}
        return packer
    raise _Refused


def _unpack(found):
    if len(found) == 1:
        (name, body), = found.items()
        unpacker = _UNPACKERS.get(name)
        if unpacker:
            return unpacker(body)
    return found


to_json = json.JSONEncoder(separators=(",", ":")).encode


def _tree_to_json(make=getattr(json.encoder, "c_make_encoder", None)):
    """to_json for what _pack() returns, which holds no cycle: set up once for all."""
    if make is None:
        return to_json
    chunks = make(
        None, None, json.encoder.encode_basestring_ascii, None, ":", ",", False, False,
        True,
    )
    return lambda tree: "".join(chunks(tree, 0))


_to_text = _tree_to_json()


def encode(value: Any, path: str) -> str:
    """Return the text of `value`, ASCII only.  `path` is its name in messages.

    Raises PayloadTypeError with the path of what cannot be sent unchanged:
    `args[0]["user"]: <class User>`.
    """
    try:
        return _to_text(_pack(value))
    except _Refused:
        raise PayloadTypeError(_blame(value, path)) from None
    except RecursionError:
        raise PayloadTypeError(
            f"{path}: nested too deeply, or contains itself"
        ) from None


def encode_call(args: tuple, kwargs: dict) -> str:
    """Return the text of a call's arguments.  Raises as encode() does."""
    try:
        return _to_text([_pack_list(args), _pack_dict(kwargs)])
    except (_Refused, RecursionError):
        encode(list(args), "args")
        encode(kwargs, "kwargs")
        raise


def _shown_key(key):
    return json.dumps(key) if isinstance(key, str) else type(key).__name__


def _blame(value, path):
    """Name the innermost part of `value` that cannot be encoded."""
    if type(value) is dict:
        parts = [(f"{path}[{_shown_key(key)}]", v) for key, v in value.items()]
        parts += [(f"{path} (a key)", key) for key in value]
    elif type(value) in (list, tuple, set, frozenset):
        parts = [(f"{path}[{i}]", part) for i, part in enumerate(value)]
    else:
        parts = []
    for name, part in parts:
        try:
            _pack(part)
        except _Refused:
            return _blame(part, name)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return (
        f"{path}: <class {kind.replace('builtins.', '')}> cannot be sent to a task; "
        "send JSON values, date, datetime, time, timedelta, Decimal, UUID, bytes, "
        "tuple or set"
    )


_scan = json.JSONDecoder().scan_once       # type: ignore[attr-defined]


def decode(text: str) -> Any:
    """Return the value whose text encode() made.

    By the scanner alone, in a third of the time of json.loads(), which is left to
    read what is no such text, and to say what is wrong with it.
    """
    if '{"$' in text:
        return json.loads(text, object_hook=_unpack)
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        end = -1
    return value if end == len(text) else json.loads(text)


# == Retry and rate ===========================================================
# Owns the arithmetic of retry delays, and of limits of starts and of runs.  Pure: the
# clock and randomness are arguments, nothing is stored here.


class RetryPolicy(NamedTuple):
    """When a failed run is followed by another.  All delays are seconds."""

    retries: int = 3            # runs after the first
    delay: float = 1.0          # before the first retry
    backoff: float = 2.0        # each delay is so many times the one before
    max_delay: float = 3600.0   # no delay is longer, before jitter
    jitter: float = 0.1         # ± this fraction, so that a herd spreads out
    retry_for: tuple = (Exception,)


def retry_delay(policy: RetryPolicy, n: int, chance: float) -> float:
    """Seconds before retry `n` (from 1); `chance` is a random number in [0, 1)."""
    longest = policy.max_delay
    if policy.delay <= 0 or longest <= 0:
        return 0.0
    # Compared by logarithm first: backoff ** 5000 would overflow.
    steps = (n - 1) * math.log(max(policy.backoff, 1e-9))
    if steps < math.log(longest / policy.delay):
        longest = policy.delay * math.exp(steps)
    return longest * (1 + policy.jitter * (2 * chance - 1))


# Rates are kept by the generic cell rate algorithm: one number per limit, the
# theoretical arrival time `tat` (unix ms) of the next start if all starts so far
# had been evenly spaced.  A start moves it on by one interval; it may run ahead
# of the clock by at most the burst, one second's worth of starts.
# https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm

LATE_TURN_MS = 10_000       # a turn reads the clock, then waits for the write lock


def _burst_ms(rate):
    return max(1.0, rate) * 1000 / rate


def _valid_tat(tat, now, rate):
    """A tat far beyond the burst was made by another clock, or for a lower limit.

    It says nothing about this limit, then, and would keep it shut for as long.  A
    little beyond is only the older `now` of a turn that waited for the write lock.
    """
    latest = now + _burst_ms(rate)
    if tat > latest + LATE_TURN_MS:
        return now
    return min(max(tat, now), latest)


def rate_tokens(tat: float, now: int, rate: float) -> int:
    """How many starts the limit of `rate` a second allows at this moment."""
    room = now + _burst_ms(rate) - _valid_tat(tat, now, rate)
    return int(room * rate / 1000 + 1e-6)


def rate_next_at(tat: float, now: int, rate: float) -> int:
    """When the next start is allowed, in unix ms; now if one is already."""
    ahead = _valid_tat(tat, now, rate) + 1000 / rate - _burst_ms(rate)
    return max(now, math.ceil(ahead - 1e-6))


# What waits in a pipe begins a little after its tokens were spent.  So they are spent
# as of the latest moment at which it may begin: then the starts themselves keep to
# the rate in every second, not only the claims.  It costs nothing while the limit is
# in use, and as much of the burst that follows on a pause.
LATE_START_MS = 100
_AHEAD_RATE = 20            # starts a second: what allows fewer never waits in a pipe


class _RateMeter:
    """A limit of starts a second: what it allows just now."""

    def __init__(self, limit, rate, tat, now):
        self.limit, self.rate, self._now = limit, rate, now
        self.token = 1000 / rate                # ms
        self.tat = _valid_tat(tat, now, rate)
        self.left = rate_tokens(tat, now, rate)
        self.is_spent = False

    def opens_at(self):
        return rate_next_at(self.tat, self._now, self.rate)

    def spend(self, is_ahead):
        if is_ahead and self.tat < self._now + LATE_START_MS:
            self.tat = float(self._now + LATE_START_MS)
        self.tat += self.token
        self.left -= 1
        self.is_spent = True


class _RunMeter:
    """A limit of runs at a time."""

    def __init__(self, left):
        self.left = left

    def opens_at(self):
        return math.inf

    def spend(self, is_ahead):
        self.left -= 1


class _Limited(NamedTuple):
    """What limits one name."""

    meters: tuple
    tokens: tuple               # (limit, ms) that one start spends
    may_wait: bool              # in a pipe


class Limits:
    """The limits that one look for work meets, and the starts that it takes.

    `rates` are starts a second by task name, "" over all; `tat_of(limit)` reads
    what is stored.  `most_running` says how many runs of a name there may be at a
    time; `running_of(name, most)` counts them, no further than that.
    """

    def __init__(self, rates: dict, most_running: dict, tat_of: Callable[[str], float],
                 running_of: Callable[[str, int], int], now: int):
        self._rates, self._most_running = rates, most_running
        self._tat_of, self._running_of, self._now = tat_of, running_of, now
        self._rate_meters: dict[str, _RateMeter] = {}   # of those met
        self._of: dict[str, _Limited] = {}              # by name

    def opens_at(self, name: str) -> float | None:
        """None when one more start of `name` is allowed now; else when it is.

        Infinite: when one of the runs of this name ends.
        """
        for meter in (self._of.get(name) or self._meet(name)).meters:
            if meter.left < 1:
                shut = [m for m in self._of[name].meters if m.left < 1]
                return max(m.opens_at() for m in shut)
        return None

    def may_wait(self, name: str) -> bool:
        """True when a start that opens_at() has allowed may be in a pipe for a while.
        """
        return self._of[name].may_wait

    def spend(self, name: str, is_ahead: bool = False) -> tuple:
        """Count a start that opens_at() has allowed; return its tokens."""
        limited = self._of[name]
        for meter in limited.meters:
            meter.spend(is_ahead)
        return limited.tokens

    def spent(self) -> list[tuple]:
        """(limit, tat) of those that gave a start, to be stored."""
        return [(m.limit, m.tat) for _, m in sorted(self._rate_meters.items())
                if m.is_spent]

    def _meet(self, name):
        rates = [self._rate_meter(n) for n in {name, ""} if n in self._rates]
        meters, most = [*rates], self._most_running.get(name)
        if most:
            meters.append(_RunMeter(most - self._running_of(name, most)))
        self._of[name] = found = _Limited(
            tuple(meters), tuple((m.limit, m.token) for m in rates),
            all(m.rate >= _AHEAD_RATE for m in rates),
        )
        return found

    def _rate_meter(self, limit):
        if limit not in self._rate_meters:
            self._rate_meters[limit] = _RateMeter(
                limit, self._rates[limit], self._tat_of(limit), self._now)
        return self._rate_meters[limit]


# == Rows =====================================================================
# Owns what goes into a queue and comes out of it, as small objects: tasks, runs and
# what becomes of them, workers, schedules.  Knows nothing of how they are kept.

MOST_ID = 10**15            # as in bg_task; times 8 it is still a row id
ID_BATCH = 100              # ids that one statement looks up

# What an end calls: the bit in bg_task.callbacks, and the option of @task.
CALLBACKS = {SUCCESS: (1, "on_success"), FAILED: (2, "on_failure")}
# What App.on() listens to, and its bit there.
LISTENED = {"success": 4, "failure": 8, "retry": 16, "crash": 32, "timeout": 64,
            "lost": 128}


class NewTask(NamedTuple):
    """A task to be enqueued, but for its arguments."""

    name: str
    queue: str
    priority: int
    key: str | None
    retries: int
    timeout: float | None
    state: int
    run_at: int
    created_at: int
    tick: int | None = None
    counted: bool = False       # run_at was counted from created_at


class Attempt:
    """One attempt of one task, as the row has it."""

    __slots__ = (
        "id", "name", "queue", "attempt", "retries", "forgiven", "timeout",
        "run_at", "tick", "args", "priority", "callbacks", "alone",
    )

    def __init__(self, id, name, queue, attempt, retries, forgiven, timeout,
                 run_at, tick, args, priority, callbacks=0, alone=0):
        self.id = id
        self.name = name
        self.queue = queue
        self.attempt = attempt + 1      # the row is counted up by the same claim
        self.retries = retries
        self.forgiven = forgiven
        self.timeout = timeout
        self.run_at = run_at
        self.tick = tick
        self.args = args                # None: the child reads them itself
        self.priority = priority
        self.callbacks = callbacks      # as in the row
        self.alone = bool(alone)        # it is to have a child to itself

    @property
    def used(self) -> int:
        """Attempts that count, this one included."""
        return self.attempt - self.forgiven

    @property
    def is_last(self) -> bool:
        """True when a failure of this attempt is final."""
        return self.attempt - self.forgiven > self.retries


class Run(Attempt):
    """An attempt that a worker has claimed, with what only that worker knows of it."""

    tokens: tuple = ()              # (limit, ms) that its start spent: Limits
    is_noted = False                # there may be rows about it: see Store.note_runs
    is_counted = False              # others of its name may wait for its end
    usual = 0.0                     # seconds that runs of this task take
    pardoned = ""                   # why its end cost it no attempt: see pardon()
    due = 0.0                       # monotonic: when it should begin, once sent


class Round(NamedTuple):
    """How far a worker has looked through what is ready.

    A look costs a bounded number of seeks.  Where more (queue, name) groups lie
    that it cannot take, further looks go on from there, until all were seen.  What
    one of them learned of limits holds for the rest of the round, so that a name is
    asked for once: the next round asks again, for others may give starts back.
    Coroutines have a round of their own: each kind of places fills up by itself.
    """

    after: tuple | None = None  # the group seen last; None: all were
    limited: dict = {}          # names at a limit, by when the next may start: of
                                # all kinds; infinite: when one of its runs ends
    again: bool = False         # something new came meanwhile
    halted: bool = False        # what comes next waits for a place, or all for a rate
    beside: Round | None = None     # that of coroutines, if there is one

    @property
    def is_over(self) -> bool:
        """True when looking on is of no use before something new comes."""
        return (self.after is None or self.halted) \
            and (self.beside is None or self.beside.is_over)

    def renewed(self) -> Round:
        """The round after something may have become ready anywhere."""
        beside = self.beside and self.beside.renewed()
        if self.after is None:
            return Round(beside=beside)
        return self._replace(again=True, halted=False, beside=beside)

    def ended(self, limited: dict) -> Round:
        """The round when its last group was seen."""
        return Round(FIRST_GROUP) if self.again else Round(None, limited)

    def with_beside(self, beside: Round) -> Round:
        """The round of both kinds.  Where one begins anew, all names are asked again.
        """
        is_new = any(r.after == FIRST_GROUP and not r.halted for r in (self, beside))
        return self._replace(limited={} if is_new else self.limited,
                             beside=beside._replace(limited={}))

    def opens_at(self) -> int | None:
        """When the first name may start that waits for a time."""
        return min((t for t in self.limited.values() if t < math.inf), default=None)


FIRST_GROUP = ("", "")               # stands before every group


class ClaimOrder(NamedTuple):
    """What a worker can take now.  Places are for runs of these kinds:

    ordinary ones, `free` that begin at once and `ahead` that wait in a pipe; and
    `beside`, for coroutines.  A run that needs a child to itself takes one of these
    and one `alone`.
    """

    worker: int
    queues: Any                 # container of those it serves; None: all
    names: Any                  # container of the task names it knows
    free: int                   # children, or threads, that have nothing to do
    ahead: int                  # more places, for tasks that may wait in a pipe
    ahead_names: Any            # set of the names that may
    rates: dict                 # starts per second by task name; "": over all
    callbacks: dict = {}        # by task name, for those that have one: as in the row
    beside: int = 0             # coroutines that could begin
    beside_names: Any = frozenset()     # the names of tasks that are coroutines
    alone: int = 0              # children in which nothing runs
    most_running: dict = {}     # runs at a time by task name, over all workers; one
                                # that knows another number holds its claims to that
    proves_begun: bool = False  # what a pipe held is no loss when this worker dies
    round: Round = Round()      # as the claim before has left it


class Claimed(NamedTuple):
    """What a claim took, or a peek would take."""

    runs: list
    next_at: int | None         # when to look again, if nobody enqueues
    round: Round
    is_registered: bool = True  # False: the worker has no row, so it gets nothing
    waits: int | None = None    # priority of the first that needs a free child


class Outcome(NamedTuple):
    """What becomes of a run: its new state and what is kept of it."""

    run: Run
    state: int
    result: str | None = None
    error: dict | None = None
    output: str = ""
    started_at: int | None = None
    duration: float | None = None
    run_at: int | None = None       # when retrying: the next run
    then: tuple = ()                # (NewTask, arguments) to be enqueued with it


class OutcomeRefused(PyBgWorkerError):
    """An outcome cannot be written, nor could it be later: `.outcome`."""

    def __init__(self, outcome: Outcome, reason: Exception):
        super().__init__(f"it cannot be stored: {type(reason).__name__}: {reason}")
        self.outcome = outcome


class Turn(NamedTuple):
    """All that a worker's turn writes, and what it could run next."""

    worker: int
    outcomes: Sequence[Outcome] = ()
    unbegun: Sequence[Run] = ()     # claimed, and never started: not counted
    stopped: Sequence[Run] = ()     # interrupted by a stop: forgiven
    progress: Sequence[tuple[Run, str]] = ()    # what runs last said of themselves
    order: ClaimOrder | None = None     # None: claim nothing
    history: RunCounts | None = None    # of turns before, to be added to history with
                                        # what is written now; None: not now

    @property
    def is_durable(self) -> bool:
        """True when it writes what must not be lost in a power cut."""
        return bool(self.outcomes or self.unbegun or self.stopped)


class Turned(NamedTuple):
    """What became of a turn."""

    written: list[Outcome]      # as they are now: a retry may have been cancelled
    stale: list[Outcome]        # not written: the run was given to somebody else
    claimed: Claimed | None
    unheard: int = 0            # of what listeners would have been told of the ends


def callback_kind(name: str) -> str:
    """on_success or on_failure for the name of a callback, else nothing.

    The task that tells listeners is one, too: on:failure.
    """
    of, _, kind = name.rpartition(":")
    if of == "on" and kind in LISTENED:
        return name
    return kind if of and kind in ("on_success", "on_failure") else ""


class TaskRow(NamedTuple):
    """A task without its arguments, and without what it left behind."""

    id: int
    state: int
    queue: str
    name: str
    priority: int
    key: str | None
    attempt: int
    retries: int
    forgiven: int
    timeout: float | None
    worker: int | None
    cancel_asked: int
    run_at: int
    created_at: int
    started_at: int | None
    finished_at: int | None
    duration: float | None
    tick: int | None

    @property
    def status(self) -> str:
        """The word for its state."""
        return state_name(self.state)


def row_id(task_id):
    """Refuse what cannot be a task's id before SQLite does, in its own words."""
    if isinstance(task_id, int) and 0 < task_id <= MOST_ID:
        return task_id
    raise TaskNotFound(f"no task {task_id!r}: an id is a whole number from 1 up")


def parse_id(text: str) -> int:
    """Return the task id that a text names.  Raises TaskNotFound for any other."""
    return row_id(int(text) if re.fullmatch(r"[0-9]{1,18}", text) else text)


class WorkerRow(NamedTuple):
    """A worker as it has registered, and as of its last heartbeat."""

    id: int
    name: str
    pid: int
    host: str
    boot: str
    port: int
    token: str
    queues: str | None
    concurrency: int
    started_at: int
    beat_at: int
    running: int
    live: int
    start_method: str = ""      # of its children, and why; as far as it is known
    # None where it has not said so: it is of an older version, or of another system.
    state: str | None = None    # starting, ready or stopping
    note: str | None = None     # its trouble: it "cannot …"
    memory: int | None = None   # bytes resident
    cpu: float | None = None    # seconds of its own process
    children_cpu: float | None = None   # … of all its children, dead ones too
    rate: float | None = None   # starts per second of all tasks; None: no limit, too
    version: str | None = None  # of its program
    max_memory: int | None = None   # bytes a child may use; None: no limit, too
    timeout: float | None = None    # of a run whose task has none; None: no limit, too


class ChildRow(NamedTuple):
    """A child, as of the last heartbeat of its worker."""

    worker: int
    pid: int
    running: int                # runs in it
    memory: int                 # bytes resident; 0: unknown
    cpu: float                  # seconds, of what it has started, too, once that ended


class Vitals(NamedTuple):
    """What a worker says of itself with a heartbeat: see WorkerRow."""

    state: str | None = None
    note: str | None = None
    memory: int | None = None
    cpu: float | None = None
    children_cpu: float | None = None
    children: Sequence[ChildRow] = ()   # whatever they say of the worker


class KnownTask(NamedTuple):
    """A task that a worker knows."""

    worker: int
    name: str
    rate: float | None          # starts per second; None: no limit
    params: tuple               # names of parameters, as in `def`; of C code none
    max_running: int = 0        # runs at a time, over all workers; 0: any number


class RunRow(NamedTuple):
    """A run that a worker has had in hand for a second; as of a second ago at most."""

    task: int
    worker: int
    attempt: int
    pid: int                    # of its child
    began_at: int | None        # unix ms; None: it waits in that child's pipe
    behind: int | None          # the task for which it waits there


class FinishedRun(NamedTuple):
    """The last run of a finished task."""

    name: str
    state: int
    run_at: int
    started_at: int | None      # None: cancelled before it began
    finished_at: int | None
    duration: float | None
    attempt: int


# What is kept of a run that is over, and of which type; each may be None but the
# number.  `outcome` is success, failed, retried, cancelled, or forgiven: it was not to
# blame, or its worker was stopped, so that it ran again, uncounted.
ATTEMPT_FIELDS: dict[str, Any] = {
    "attempt": int,             # 1 for the first run
    "started_at": int,          # unix ms
    "waited": (int, float),     # seconds since it was due
    "duration": (int, float),   # seconds
    "worker": str,              # name
    "outcome": str,
    "kind": str,                # of the error, as in TaskError; its type; the head of
    "type": str,                # its message
    "error": str,
    "signal": str,              # that ended its child
    "exit_code": int,           # … or with which that has ended
    "peak": int,                # bytes of memory that its process had at most by then
    "cpu": (int, float),        # seconds; of one that died with its child, of that
}


class LostRun(NamedTuple):
    """A run whose worker died, and the state its task was put into."""

    id: int
    name: str
    attempt: int
    state: int
    worker: str
    begun: bool = True          # False: it had not, for sure, and is not counted


AHEAD_MS = 60_000           # a row set so long after now was by a clock ahead of ours


class ScheduleRow(NamedTuple):
    """A schedule is known by its first four fields: by what it says."""

    task: str
    expr: str
    tz: str
    number: int
    misfire: str
    overlap: str
    jitter: float
    next_tick: int | None
    last_tick: int | None
    done: str
    set_at: int
    seen_at: int
    last_id: int | None = None      # of the last task that it enqueued
    success_at: int | None = None   # when one of them ended with success
    alert_after: float | None = None    # seconds after a tick: see late_tick()
    since: int | None = None        # unix ms of its first registration

    @property
    def name(self) -> str:
        """For people: the task, and a number if several are equal."""
        if not self.number:
            return self.task
        number = self.number + 1 if isinstance(self.number, int) else self.number
        return f"{self.task}#{number}"


class ScheduleStep(NamedTuple):
    """A schedule as it was read and as it shall be, and the runs that it owes."""

    row: ScheduleRow
    new: ScheduleRow
    runs: list[NewTask]         # one for each tick; of those with a key the first


class Sizes(NamedTuple):
    """What a database takes on its disk, in bytes."""

    main: int               # the file
    wal: int                # its write-ahead log
    free: int               # in the file, and used up before it grows


class ClockView(NamedTuple):
    """What the workers of a database believe about the wall clock, in unix ms."""

    seen: int               # the last look at a clock that was believed
    doubted: int | None     # the first look after a leap forward that is not, yet


# == Run counts ===============================================================
# Owns the rows of history: how runs that ended become counts, how counts are added,
# and what they say of time.  Each row is of one task in one queue, over one span.
# Knows nothing of how rows are kept, and nothing of single runs once they are counted.

# What a run took, or waited, is counted in the first of these that it does not
# exceed, in seconds; one more count is of what is longer still.
HISTORY_BOUNDS = (
    .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100, 250,
    500, 1000, 2500, 5000, 10000,
)
_BOUNDS_MS = tuple(bound * 1000 for bound in HISTORY_BOUNDS)
_NO_COUNTS = (0,) * (len(HISTORY_BOUNDS) + 1)
MINUTE, QUARTER, DAY = 60, 900, 86_400      # seconds; the spans of history
# Seconds for which rows of each span are kept: the shorter it is, the less long.
HISTORY_KEPT = {MINUTE: 3 * 3600, QUARTER: 8 * DAY, DAY: 400 * DAY}
MOST_GROUPS = 1000          # (name, queue) that are told apart in one span
OTHER_GROUP = ("(other)", "(other)")        # all that are more


class HistoryRow(NamedTuple):
    """Runs that ended, of one task in one queue, over one span of time.

    `runs` is all of them, whatever became of the task: those that did not fail, were
    not retried and not cancelled, have succeeded.  What `exceptions` … `aborted` count
    ended badly.  A run whose child or worker is gone may have no times: then it is in
    neither of the last two, whose bounds are HISTORY_BOUNDS.
    """

    span: int               # seconds: MINUTE, QUARTER or DAY; 0: since ever
    at: int                 # unix s of its start; 0 where span is 0
    name: str               # of the task
    queue: str
    lo: int = 0             # the lowest task id in it
    hi: int = 0             # … and the highest
    runs: int = 0           # that ended
    failed: int = 0         # … for good
    retried: int = 0        # … with another run to come
    cancelled: int = 0      # … by a cancellation
    exceptions: int = 0     # by an exception
    crashed: int = 0        # with their child
    timeouts: int = 0       # at their limit
    lost: int = 0           # with their worker
    aborted: int = 0        # by Abort
    ran_ms: int = 0         # the sum of what they took
    waited_ms: int = 0      # the sum of what they waited since they were due
    ran: tuple = _NO_COUNTS         # how many took so long: 23 counts
    waited: tuple = _NO_COUNTS      # how many waited so long

    @property
    def succeeded(self) -> int:
        """Runs that came to a good end."""
        return self.runs - self.failed - self.retried - self.cancelled


def merged(rows: Iterable[HistoryRow]) -> HistoryRow:
    """All rows as one.  It has their name, queue and span where that is the same for
    all, else "" or 0; and the earliest `at`.  Of no rows: nothing but zeros."""
    rows = list(rows)
    if not rows:
        return HistoryRow(0, 0, "", "")
    spans, starts, names, queues, lows, highs, *numbers, ran, waited = zip(*rows)
    return HistoryRow._make((
        spans[0] if len(set(spans)) == 1 else 0, min(starts),
        names[0] if len(set(names)) == 1 else "",
        queues[0] if len(set(queues)) == 1 else "",
        min(lows), max(highs), *map(sum, numbers),
        tuple(map(sum, zip(*ran))), tuple(map(sum, zip(*waited))),
    ))


def quantile(counts: Sequence[int], part: float) -> float | None:
    """The seconds that `part` (0 to 1) of what is counted do not exceed; None: nothing
    is counted.  About: what is between two bounds is taken to be spread evenly.

    What is above the last bound is said to be that bound.
    """
    rank, seen = part * sum(counts), 0
    for n, count in enumerate(counts):
        if count > 0 and seen + count >= rank:
            if n == len(HISTORY_BOUNDS):
                break
            low = HISTORY_BOUNDS[n - 1] if n else 0.0
            share = max(0.0, rank - seen) / count
            return low + (HISTORY_BOUNDS[n] - low) * share
        seen += count
    return float(HISTORY_BOUNDS[-1]) if seen or sum(counts) > 0 else None


# What is counted of each kind of error; of others nothing.
_BAD_ENDS = ("exception", "crash", "timeout", "lost", "abort")


class _Group(NamedTuple):
    """What is kept of the runs of one task in one queue until they are counted."""

    ran: list               # seconds
    waited: list            # ms
    ids: list               # of tasks, once for each run
    ends: list              # (state, kind of error) of all but plain successes


def _nothing():
    return None, None, None, None


class RunCounts:
    """Runs that ended and are not in history yet.

    What can wait is done in rows(): add() is called for every run.  At most MOST_GROUPS
    are told apart, as long as `known` is the same set.
    """

    def __init__(self, known: set | None = None):
        self.known = set() if known is None else known
        self._groups: dict[tuple, _Group] = {}      # by (name, queue)
        # By name, of the queue that it had last: that, and append of three lists.
        self._last: dict = collections.defaultdict(_nothing)

    def __bool__(self):
        return bool(self._groups)

    def place(self, pair: tuple) -> tuple:
        """The pair under which runs of a (name, queue) are counted."""
        if len(self.known) >= MOST_GROUPS and pair not in self.known:
            return OTHER_GROUP
        self.known.add(pair)
        return pair

    def _group(self, pair):
        pair = self.place(pair)
        if pair not in self._groups:
            self._groups[pair] = _Group([], [], [], [])
        return self._groups[pair]

    def _turn_to(self, run):
        group = self._group((run.name, run.queue))
        self._last[run.name] = found = (
            run.queue, group.ran.append, group.waited.append, group.ids.append)
        return found

    def add(self, outcomes: Iterable[Outcome]) -> None:
        """Keep these; a run that was cancelled before it began is none."""
        last = self._last
        for run, state, _, error, _, started_at, duration, _, _ in outcomes:
            if state != SUCCESS or started_at is None or duration is None:
                self._add_other(run, state, error, started_at, duration)
                continue
            queue, add_ran, add_waited, add_id = last[run.name]
            if queue != run.queue:
                _, add_ran, add_waited, add_id = self._turn_to(run)
            add_ran(duration)
            add_waited(started_at - run.run_at)
            add_id(run.id)

    def _add_other(self, run, state, error, started_at, duration):
        if state == CANCELLED and duration is None:
            return
        group = self._group((run.name, run.queue))
        group.ids.append(run.id)
        if started_at is not None:
            group.waited.append(started_at - run.run_at)
        if duration is not None:
            group.ran.append(duration)
        if state != SUCCESS:
            group.ends.append((state, error and error.get("kind")))

    def add_lost(self, run: Run, state: int) -> None:
        """Keep a run whose worker died; `state` is what its task was put into."""
        group = self._group((run.name, run.queue))
        group.ids.append(run.id)
        group.ends.append((state, "lost"))

    def plus(self, outcomes: Iterable[Outcome]) -> RunCounts:
        """These and more, as another one: this one stays as it is."""
        both = RunCounts(self.known)
        for pair, group in self._groups.items():
            both._groups[pair] = _Group(*map(list, group))
        both.add(outcomes)
        return both

    def rows(self, span: int, at: int) -> list[HistoryRow]:
        """As rows of a span that starts at `at`; what is kept is sorted by that."""
        return [_counted(span, at, *item) for item in self._groups.items()]


def _counted(span, at, pair, group):
    ran, waited, ids, ends = group
    states = [state for state, _ in ends]
    kinds = [kind for _, kind in ends]
    failed, cancelled = states.count(FAILED), states.count(CANCELLED)
    ran_ms, ran = _summed(ran, HISTORY_BOUNDS, 1000)
    waited_ms, waited = _summed(waited, _BOUNDS_MS, 1)
    return HistoryRow._make((
        span, at, *pair, min(ids), max(ids), len(ids), failed,
        len(ends) - failed - cancelled, cancelled, *map(kinds.count, _BAD_ENDS),
        ran_ms, waited_ms, ran, waited))


def _summed(values, bounds, ms):
    """(their sum in ms, how many lie up to each bound and above the one before).

    Negative ones are of a clock that was set: as good as 0.
    """
    if not values:
        return 0, _NO_COUNTS
    values.sort()
    if values[0] < 0:
        values = [max(0, value) for value in values]
    counts, seen = [*_NO_COUNTS], 0
    last = bisect.bisect_left(bounds, values[-1])
    for n in range(bisect.bisect_left(bounds, values[0]), last):
        up_to = bisect.bisect_right(values, bounds[n])
        counts[n], seen = up_to - seen, up_to
    counts[last] = len(values) - seen
    return round(min(sum(values) * ms, MOST_ID)), tuple(counts)
# == People ===================================================================
# Owns what people read of many tasks, and what they do to them: the rows, and the
# verbs, which every Store has as well.  One that reads takes a bounded time, or says
# how far it came; one that acts writes down who did it, in the same transaction.

class By(NamedTuple):
    """Who does something."""

    who: str                # a login name, or what user() says
    how: str                # cli, web, program or worker


def login_name() -> str:
    """Who runs this process, for people: under sudo, the one who has called it."""
    user = os.getuid() if hasattr(os, "getuid") else None
    if user == 0 and os.environ.get("SUDO_USER"):
        return os.environ["SUDO_USER"]
    with contextlib.suppress(ImportError, KeyError, OSError):
        import pwd

        return pwd.getpwuid(user or 0).pw_name
    named = os.environ.get("USER") or os.environ.get("USERNAME")
    return named or ("unknown" if user is None else f"uid {user}")


class Filter(NamedTuple):
    """Which tasks; None: any."""

    state: int | None = None
    name: str | None = None
    queue: str | None = None
    text: str | None = None         # in its name, its arguments or its error
    since: int | None = None        # unix ms: it ended then, else began, else came in
    error: str | None = None        # type of its exception, or kind of its error

    def __str__(self) -> str:
        said = self._asdict()
        said["state"] = None if self.state is None else state_name(self.state)
        said["since"] = None if self.since is None else iso_time(self.since)
        return ", ".join(f"{key} {value}" for key, value in said.items()
                         if value is not None) or "all"


class QueueRow(NamedTuple):
    """A queue that has unfinished tasks, or is paused.  Times are unix ms."""

    name: str
    scheduled: int = 0
    retrying: int = 0
    queued: int = 0
    running: int = 0
    oldest_at: int | None = None    # when the oldest task that may run became due
    next_at: int | None = None      # when the first is due that waits for its time
    paused_at: int | None = None    # None: it is not paused
    paused_by: str | None = None
    reason: str | None = None


class FailureRow(NamedTuple):
    """A task that failed for good."""

    id: int
    name: str
    queue: str
    finished_at: int
    kind: str                       # exception, timeout, crash, lost or abort
    type: str
    message: str


class EventRow(NamedTuple):
    """Something that a person has done, or has missed."""

    id: int
    at: int
    who: str
    how: str
    action: str
    target: str
    detail: str | None


class Page(NamedTuple):
    """Some tasks, and where it goes on."""

    rows: list[TaskRow]
    next: str | None                # for page(before=); None: this was the end
    searched_to: int | None = None      # id of the last task looked at; None: of all
    searched_at: int | None = None      # … and its time, as in Filter.since


KEY_HELD = "another task with its key is unfinished"    # why it cannot be retried


class Acted(NamedTuple):
    """What became of many tasks."""

    done: int
    skipped: int                    # it could not be done to them
    left: int                       # still to be looked at, at least; 0: it is over
    next: str | None = None         # for act(after=): where it goes on
    reasons: dict = {}              # why, and to how many of the skipped


class PeopleVerbs(Protocol):
    """For people."""

    def queues(self, now: int) -> list[QueueRow]:
        """The queues that have unfinished tasks, or are paused, by name.

        Counted by their indexes: history costs nothing.
        """

    def waiting_names(self, limit: int) -> list[tuple[str, str]]:
        """(queue, name) of what is ready to run, one seek for each; `limit` at most."""

    def page(self, filter: Filter, before: str | int | None = None, limit: int = 50,
             seconds: float = 0.15, match: Callable | None = None,
             clock: Callable[[], float] = time.monotonic) -> Page:
        """Tasks, `limit` at most, from where another page ended.

        Failed and cancelled ones: the last to end first; queued ones in the order of
        claims; scheduled and retrying ones: the first to be due first; all others:
        the newest first.  Looks for about `seconds`, by `clock`.  `before` may also
        be the id of the last task that was seen.  Raises OptionError for one that
        never was.

        `match(row, args, error)` decides on each task in which SQL has found the text
        of the filter: `args` is the encoded call, `error` a dict or None.  Whoever
        hides values from readers must say False where only those contain it.
        """

    def count(self, filter: Filter, max_id: int | None = None,
              at_most: int | None = None, seconds: float | None = None) -> int:
        """How many there are, up to an id; stops at `at_most`, and after `seconds`."""

    def arrivals(self, now: int, most: int = 10_000) -> dict[str, float]:
        """Tasks a minute by queue: those of the last minute that may run by now.

        Counted among the newest tasks, at most so many; where more came in within a
        minute, by the pace of those.
        """

    def failures(self, since: int, limit: int = 1000) -> list[FailureRow]:
        """The newest tasks that failed for good since then."""

    def act(self, action: str, what: Filter | Sequence[int], now: int,
            by: By | None = None, max_id: int | None = None, spread: float = 0.0,
            limit: int = 500, after: str | None = None,
            match: Callable | None = None) -> Acted:
        """Do something to the tasks of a filter, or of these ids; `limit` at a time.

        retry: queue finished ones again, those that failed if the filter has no
        state; what waits for its time has it come.  Over `spread` seconds, if given.
        cancel: those that wait; running ones if the filter says so.  forget: delete
        finished ones.  run_now: what waits for its time.

        To be called again until nothing is left, with `after` as it was returned, and
        the same `now`, so that it is one event.  Tasks above `max_id` are not meant.
        Whatever changes meanwhile: each is done once, and only where it still can be.
        """

    def pause(self, queue: str, now: int, by: By | None = None,
              reason: str | None = None) -> None:
        """Claim nothing from this queue until resume(); what has not begun returns.

        Of one that is paused already only the reason changes, if there is a new one.
        """

    def resume(self, queue: str, by: By | None = None) -> bool:
        """Undo pause().  False when it was not paused."""

    def paused_queues(self) -> list[str]:
        """Names of the queues that are paused."""

    def forget_schedule(self, row: ScheduleRow, by: By | None = None) -> bool:
        """Delete a schedule.  False when it is gone, or a worker has registered it
        since `row` was read.
        """

    def events(self, before: int | None = None, limit: int = 50) -> list[EventRow]:
        """What people did, the newest first; those with an id below `before`."""

    def note_event(self, by: By, action: str, target: str, detail: str | None,
                   now: int) -> None:
        """Write down what somebody does that no other verb writes down."""

    def tasks(self, state: int | None = None, name: str | None = None,
              queue: str | None = None, limit: int = 50) -> list[TaskRow]:
        """The newest tasks first, as many as `limit`."""

    def counts(self) -> list[tuple[str, str, int, int]]:
        """(queue, name, state, number) over all tasks.  Reads the whole table."""

    def indexed_counts(self) -> list[tuple[str, str, int, int]]:
        """The same of all that have not succeeded, for which there are indexes."""

    def finished_runs(self, limit: int) -> list[FinishedRun]:
        """Those of the newest finished tasks, as many as `limit`: for the bench."""

    def newest_options(self, name: str) -> dict:
        """Queue, priority, retries, timeout of the newest task of a name, or nothing.

        Looks at the newest 100,000 tasks, for names have no index.
        """

    def purge(self, queue: str | None, name: str | None, now: int,
              by: By | None = None) -> int:
        """Cancel all waiting tasks of a queue, a name, or both; return how many.

        Not in one step: what was cancelled before an error stays so.
        """

    def prune(self, cursor: int, before: int | None, failed_before: int | None,
              batch: int, by: By | None = None, now: int = 0) -> tuple[int, int]:
        """Delete what finished before the two times; None keeps it.

        Looks at `batch` rows above the id `cursor`; returns (deleted, new cursor),
        with cursor 0 once the end is reached.
        """

    def count_old(self, before: int | None, failed_before: int | None) -> int:
        """How many tasks prune() would delete."""


# == Printed ==================================================================
# Owns how much is kept of what a run prints, while it runs and after that: its
# beginning and its end, and a mark where something was cut.

OUTPUT_PART = 32_000            # characters kept of the beginning; as many of the end
OUTPUT_CHUNK = 16_000          # in one row at most, while it runs
_MANY_PIECES = 500              # of text, that are made one


class OutputRow(NamedTuple):
    """A part of what a run has printed so far.  Between two, some may be cut."""

    seq: int                    # characters that it had printed before
    at: int                     # unix ms when it was written
    body: str


class PrintedRun(NamedTuple):
    """What the database shall have of the output of a run, from now on."""

    run: Run
    parts: Sequence[tuple[int, str]]    # (seq, body) of new rows
    size: int                           # characters that it has printed so far


def cut_mark(size: int) -> str:
    """The line in place of so many characters."""
    return f"\n… {size:,} characters cut …\n"


_CUT = re.compile(r"\n… ([\d,]{1,30}) characters cut …\n")


def parts_of(text: str) -> list[tuple[int, str]]:
    """What Kept.parts() was for this Kept.text()."""
    mark = _CUT.match(text, OUTPUT_PART)
    if mark is None or not mark[1].replace(",", ""):
        return [(0, text)]
    return [(0, text[:OUTPUT_PART]),
            (OUTPUT_PART + int(mark[1].replace(",", "")), text[mark.end():])]


class Kept:
    """What is kept of all that one run prints."""

    def __init__(self, head: int = OUTPUT_PART):
        self._room = head           # characters that are kept of the beginning
        self.size = 0               # … of all
        self.told = 0               # … of which the database knows
        self._head: list[str] = []
        self._head_size = 0
        self._tail: collections.deque[str] = collections.deque()
        self._tail_size = 0

    def add(self, text: str) -> None:
        """It has printed this."""
        room = self._room - self._head_size
        if room > 0 and self.size == self._head_size:
            self._head.append(text[:room])
            self._head_size += len(self._head[-1])
            self.size += len(self._head[-1])
            text = text[room:]
        if text:
            self._tail.append(text[-OUTPUT_PART:])
            self._tail_size += len(self._tail[-1])
            self.size += len(text)
            self._shorten()

    def _shorten(self):
        """Let go of what is before the end, and of what many pieces take."""
        tail = self._tail
        while self._tail_size - len(tail[0]) >= OUTPUT_PART:
            self._tail_size -= len(tail.popleft())
        if len(tail) > _MANY_PIECES:
            self._tail = collections.deque(["".join(tail)[-OUTPUT_PART:]])
            self._tail_size = len(self._tail[0])
        if len(self._head) > 1:
            self._head = ["".join(self._head)]

    def skip(self, size: int) -> None:
        """So much was printed that nobody has kept."""
        self._tail.clear()
        self._tail_size = 0
        self.size += size

    def parts(self) -> list[tuple[int, str]]:
        """(seq, text) of the beginning, and of the end."""
        tail = "".join(self._tail)[-OUTPUT_PART:]
        return [(0, "".join(self._head)), (self.size - len(tail), tail)]

    def text(self) -> str:
        """All of it, in the order in which it was printed."""
        (_, head), (start, tail) = self.parts()
        cut = start - len(head)
        return head + cut_mark(cut) + tail if cut else head + tail

    def untold(self) -> list[tuple[int, str]]:
        """(seq, body) of the rows that say what the database does not know yet."""
        found = []
        for start, text in self.parts():
            first = max(start, self.told)
            text = text[first - start:]
            found += [(first + n, text[n:n + OUTPUT_CHUNK])
                      for n in range(0, len(text), OUTPUT_CHUNK)]
        return found


def kept_of(rows: Iterable[OutputRow]) -> Kept:
    """The same, of what the database has."""
    kept = Kept()
    for row in rows:
        if row.seq > kept.size:
            kept.skip(row.seq - kept.size)
        kept.add(row.body)
    return kept


# == Evidence =================================================================
# Owns what is known of why a queue does what it does: of one task, and of all.  What
# makes a sentence of it is a room; so this is plain, and of one moment.  Times are
# unix ms, as everywhere; a row that somebody edited may hold what no program wrote.

AHEAD_MOST = 1_000_000      # tasks that are counted ahead of one: "more than"


class WorkerFacts(NamedTuple):
    """A registered worker, alive or not, and what it has said of itself."""

    row: WorkerRow
    running: int = 0                # tasks it has claimed and not finished
    claimed_at: int | None = None   # … when it claimed the last of them
    names: frozenset | None = None  # of the tasks it knows; None: not said
    name_rate: float | None = None  # starts a second of the task that is asked about
    max_running: int | None = None  # … and its runs at a time, over all workers


class Pace(NamedTuple):
    """Runs of one task in one queue that ended of late."""

    queue: str
    name: str
    runs: int
    since: int                      # when their count began


class Ahead(NamedTuple):
    """Ready tasks of one group and priority that are claimed before a task."""

    queue: str
    name: str
    priority: int
    tasks: int


class Act(NamedTuple):
    """What somebody did to a task, or a worker at its end."""

    at: int
    who: str
    how: str
    action: str
    detail: str | None


class Pause(NamedTuple):
    """A queue that is paused."""

    queue: str
    at: int
    by: str | None
    reason: str | None
    waiting: int = 0                # ready tasks, counted up to a limit


class InHand(NamedTuple):
    """A run that its worker has had for a second."""

    task: int
    name: str
    worker: int
    began_at: int | None            # None: it waits in the pipe of a child
    behind: int | None = None       # the task that it waits for there
    behind_at: int | None = None    # … when that began
    timeout: float | None = None
    ran: tuple = ()                 # counts of what such runs took in the last day


class TaskFacts(NamedTuple):
    """What tells why a task is as it is."""

    id: int
    now: int
    last_id: int = 0                # the highest id ever given
    task: TaskRow | None = None     # None: there is none
    alone: bool = False             # its next run needs a child to itself
    error: dict | None = None
    progress: list | None = None
    attempts: tuple = ()            # dicts of its runs, as far as they are kept
    act: Act | None = None          # who ended it, or deleted it
    holder: int | None = None       # another task with its key, unfinished
    pause: Pause | None = None      # of its queue
    workers: tuple[WorkerFacts, ...] = ()
    left: Act | None = None         # the end of the last worker, where there is none
    run: InHand | None = None
    ran: tuple = ()                 # counts of what its runs took in the last day
    last_run: int | None = None     # when a task of its name ended last
    names: tuple = ()               # that workers know, where none knows its own
    due: int = 0                    # tasks due that wait to be made ready
    batch: int = 0                  # … of which a turn takes so many
    ahead: tuple[Ahead, ...] = ()   # ready, and before it; those paused left out
    is_more: bool = False           # there are more ahead than were counted
    recent: int = 0                 # how many came of lower priority numbers …
    recent_since: int | None = None     # … since then, if that was looked for
    pace: tuple[Pace, ...] = ()
    tats: dict = {}                 # of limits of starts, see rate_tokens()
    running: int = 0                # runs of its name
    # What the caller knows beside that.
    dead: frozenset = frozenset()   # ids of workers known to be dead, by the kernel
    worker_timeout: float = 15.0    # seconds that one may be silent
    retention: float | None = None  # seconds that finished tasks are kept


class Head(NamedTuple):
    """The first ready task of a group and priority."""

    id: int
    queue: str
    name: str
    priority: int
    run_at: int


class Recent(NamedTuple):
    """How the runs of a task ended of late."""

    name: str
    runs: int                       # of the last ten minutes
    bad: int                        # … that failed, for good or not
    crashed: int                    # of the last hour, with their child
    error: dict | None = None       # that of most of them


class ScheduleFacts(NamedTuple):
    """A schedule, and how its last run ended."""

    row: ScheduleRow
    last_state: int | None = None


class ChildFacts(NamedTuple):
    """A child, as of its worker's last heartbeat."""

    worker: int
    pid: int
    memory: int


class SystemFacts(NamedTuple):
    """What tells whether a queue needs somebody."""

    now: int
    has_work: bool = False          # something is unfinished, or on a schedule
    workers: tuple[WorkerFacts, ...] = ()
    gone: tuple = ()                # (worker id, runs) of those without a row
    left: Act | None = None
    pauses: tuple[Pause, ...] = ()
    heads: tuple[Head, ...] = ()
    is_more: bool = False           # there are more groups than heads
    waits: dict = {}                # by queue: counts of what runs waited in a day
    recent: tuple[Recent, ...] = ()
    schedules: tuple[ScheduleFacts, ...] = ()
    children: tuple[ChildFacts, ...] = ()
    long: tuple[InHand, ...] = ()   # runs of over a minute
    clock: ClockView | None = None
    dead: frozenset = frozenset()


# == Store ====================================================================
# Owns what can be done to a queue.  Each verb is one atomic step, but for two that
# say so; it is durable when it returns, if it has to be, and leaves nothing open.
# STORES says who keeps a queue; read this section, and you know what one does.

class QueueVerbs(Protocol):
    """What it is, and what it needs itself."""

    path: str           # where it is, for people and for files beside it
    name: str           # the same as it was given
    follow: bool        # whether to go on with another database put in its place

    def create(self) -> tuple | None:
        """Open the database; make file and tables if there are none.

        Returns (version before, version now, seconds) if this store has brought old
        tables up to date, which may take long and lets nobody else write.
        Only delay() and a worker's start do; all else wants a queue that is there.
        Raises DatabaseUnavailable for one that this process has used and lost.
        """

    def close(self) -> None:
        """Close this thread's connection.  It opens again when used again."""

    def data_version(self) -> tuple:
        """Equal for two looks of one thread if no other connection has committed.

        A connection counts for itself: one that was opened anew compares unequal.
        """

    def version(self) -> tuple:
        """Equal for two looks of one thread if nothing was committed in between."""

    def now(self) -> int:
        """The time by which this queue goes, which may be that of its server."""

    def housekeep(self) -> None:
        """Do what the queue itself needs, in little time: asked for once a second."""

    def sizes(self) -> Sizes:
        """What the queue takes on its disk."""

    def last_id(self) -> int:
        """The highest id that was ever given; 0: none."""

    def glance(self, seconds: float) -> contextlib.AbstractContextManager:
        """Within it this thread only reads, for so many seconds of CPU, or five times
        as many by the clock: then what it asks raises DatabaseBusy.
        """


class ProgramVerbs(Protocol):
    """For programs."""

    def enqueue(self, task: NewTask, calls: Sequence[str]) -> list:
        """Insert a row for each text of encoded arguments; return the ids in order.

        If the key is held by an unfinished task, nothing is inserted and that one's
        id is returned.  Durable when this returns.
        """

    def enqueue_with(self, connection: sqlite3.Connection, task: NewTask,
                     calls: Sequence[str]) -> tuple[list, str | None]:
        """The same in the transaction of a caller's connection; also return a mark.

        After a rollback whoever enqueues next gets the same ids: only the rows of
        this call have its mark.  None: the row is one that was committed before.
        """

    def has_mark(self, task_id: int, mark: str) -> bool:
        """True for a task that was committed by the enqueue_with() of this mark."""

    def task(self, task_id: int) -> TaskRow:
        """Return one task.  Raises TaskNotFound."""

    def state(self, task_id: int) -> int:
        """Return the state of one task.  Raises TaskNotFound."""

    def unfinished(self, ids: list[int]) -> set[int]:
        """Those of at most ID_BATCH ids that are unfinished: others ended, or are gone.
        """

    def args(self, task_id: int) -> str:
        """Return the encoded arguments.  Raises TaskNotFound."""

    def outcome(self, task_id: int) -> tuple[int, str | None, dict | None]:
        """Return state, encoded result and error, all of one moment."""

    def error(self, task_id: int) -> dict | None:
        """Return what the last failed run left: kind, type, message, traceback."""

    def output(self, task_id: int) -> str | None:
        """Return what the last run printed, as far as it was kept."""

    def progress(self, task_id: int) -> list | None:
        """Return [percent, message] as the task last set it, or None."""

    def attempts(self, task_id: int) -> list[dict]:
        """The newest 20 runs that are over, oldest first: all of ATTEMPT_FIELDS.

        They stay when the task is retried.  Raises TaskNotFound.
        """

    def attempt_output(self, task_id: int, attempt: int) -> str | None:
        """What this run has printed, as far as it was kept, which is of the last one
        that is over and of five before that.  Raises TaskNotFound.
        """

    def cancel(self, task_id: int, now: int, by: By | None = None) -> int:
        """Cancel what waits; ask for the end of what runs.  Returns the old state.

        Raises TaskNotFound.  A finished task is left as it is.
        """

    def retry(self, task_id: int, now: int, by: By | None = None) -> None:
        """Queue a finished task again, with all its retries.

        Raises TaskNotFound; TaskStateError when it is not finished, or when its
        key is held by another.
        """

    def forget(self, task_id: int, by: By | None = None) -> None:
        """Delete a finished or waiting task.  Raises TaskNotFound, TaskStateError."""


class HistoryVerbs(Protocol):
    """What it tells of runs that ended, by the minute: see HistoryRow."""

    def history(self, span: int, since: int, until: int | None = None,
                name: str | None = None, queue: str | None = None,
                by: str = "") -> list[HistoryRow]:
        """Rows of MINUTE, QUARTER or DAY: from the span that holds `since` on, up to
        those that begin before `until` (default: now), oldest first.

        With by="at" there is one for each span, over all names and queues; with "queue"
        one for each span and queue; with "name" one for each name and queue, over all
        that time: see merged().  Kept: minutes
        for 3 hours, quarters for 8 days, days for 400.  What is not rolled up yet is
        in quarters and days, too.
        """

    def totals(self) -> list[HistoryRow]:
        """Runs that ended since there is a history: a row for each name and queue.

        No number in it ever falls, whatever is rolled up or deleted.
        """

    def roll_up(self, now: int) -> bool:
        """Add minutes that are over to quarters, days and what is since ever; delete
        rows that are too old.  In little time; True: there is more to do.

        Of several workers that try it one does it; the sums stay what they are.
        """


class WorkVerbs(Protocol):
    """For workers, at work."""

    def peek(self, order: ClaimOrder, now: int) -> tuple[bool, Claimed]:
        """(a claim would find something, what this look saw).  Takes no lock."""

    def turn(self, turn: Turn, now: int, patience: float) -> Turned:
        """Write and claim, in one transaction: all or nothing.

        An outcome is stale when the row is no longer running, or runs for somebody
        else; it keeps what that one wrote.  Raises OutcomeRefused for the first that
        can never be written, and DatabaseBusy after `patience` seconds.
        """

    def cancels_asked(self, worker: int) -> list[int]:
        """Ids of the worker's running tasks that somebody wants ended."""

    def pauses_asked(self, worker: int) -> set[str]:
        """The paused ones among the queues of the worker's running tasks.

        Costs nothing more for what is paused elsewhere.
        """


class WorkerVerbs(Protocol):
    """For workers, about each other."""

    def add_worker(self, values: dict, lock: Callable[[int], Any]) -> int:
        """Register a worker; return its id.  `values` are those of a WorkerRow from
        name to concurrency, `live`, and `now`; perhaps its `start_method`, `rate`,
        `version`, its settings max_memory and timeout, and `tasks`: KnownTasks,
        whatever they say of the worker.

        `lock(id)` is called before the commit: nobody can find the row and its
        byte unlocked.  Guarded by test_a_starting_worker_is_never_reaped.
        """

    def beat(self, worker: int, running: int, live: int, now: int,
             vitals: Vitals = Vitals()) -> bool:
        """Write a heartbeat.  False: the worker was taken for dead and reaped."""

    def workers(self, after: int = 0, limit: int = -1) -> list[WorkerRow]:
        """The registered workers, alive or not; `limit` of them above an id."""

    def running_counts(self) -> dict[int, int]:
        """How many tasks each worker has claimed and not finished, by its id."""

    def reap(self, worker: int, name: str, now: int, beat_at: int | None = None,
             begun: Container[tuple[int, int]] | None = None) -> list[LostRun]:
        """Remove a dead worker; put each run it held where it goes from there.

        `begun` are the (id, attempt) of those that had begun; None: all, perhaps.
        The others are queued again, and that attempt was none; but what they have
        spent of rates stays spent, for only the dead one knew what that was.  Does
        nothing if it has beaten since `beat_at`: it is not dead, then.
        """

    def unknown_workers(self) -> list[int]:
        """Workers that hold runs but have no row: somebody edited the database."""

    def remove_worker(self, worker: int, cpu: float | None = None,
                      children_cpu: float | None = None) -> None:
        """Take a worker off; one that still holds a task is left to be reaped.

        With what it has used of CPU, if that is more than it last said.
        """

    def remove_dead(self, rows: Sequence[WorkerRow]) -> None:
        """Take dead workers off that hold no task and have not beaten since."""


class LiveVerbs(Protocol):
    """About what runs now."""

    def children(self) -> list[ChildRow]:
        """The children of the registered workers, as of their heartbeats."""

    def known_tasks(self) -> list[KnownTask]:
        """What the registered workers know, callbacks of tasks too; by name.

        A worker of an older version has not said.
        """

    def departed_cpu(self) -> tuple[float, float]:
        """Seconds of CPU of the workers that have left, and of their children."""

    def runs(self) -> list[RunRow]:
        """What registered workers have had in hand for a second, the oldest first."""

    def live_output(self, task_id: int, attempt: int,
                    after: int = -1) -> list[OutputRow]:
        """What a running attempt has printed so far: rows with a higher seq.

        Only of those that run for longer than a second; what has ended is in output().
        """

    def note_runs(self, worker: int, rows: Sequence[RunRow],
                  gone: Sequence[tuple[int, int]], printed: Sequence[PrintedRun],
                  now: int) -> None:
        """Write what this worker has in hand, as far as that is still its own.

        `gone` are (id, attempt) that it has not, for now.  The end of a run, or its
        return, takes its rows along; only of those whose `is_noted` is set.
        """


class TimeVerbs(Protocol):
    """For workers, about time."""

    def schedules(self) -> list[ScheduleRow]:
        """All schedules, whether a worker still knows them or not."""

    def due_schedules(self, now: int) -> list[ScheduleRow]:
        """Those whose time has come, or was set by a clock ahead of ours."""

    def next_tick(self, now: int) -> int | None:
        """Unix seconds of the first tick of any schedule after now."""

    def put_schedules(self, rows: Sequence[ScheduleRow], drop: bool = True) -> None:
        """Register schedules.  Known ones keep their ticks, and take the next one
        only if nobody has moved them on since `done` was read.

        With `drop`, those go that nobody has served or registered for a day, if their
        task is registered here with others: what the program said before.
        """

    def fire(self, steps: Sequence[ScheduleStep],
             patience: float | None = None) -> list[list[int] | None]:
        """Move schedules on and insert the runs they owe, all in one transaction.

        Returns the ids of the runs of each: fewer than there are if one with its key
        is unfinished; None if another worker has moved that schedule before.
        """

    def is_first(self, what: str, ms: int, now: int) -> bool:
        """True once in so many ms for the same `what`, whoever asks."""

    def clock(self) -> ClockView | None:
        """What was last put by put_clock(); None: nothing yet."""

    def put_clock(self, view: ClockView) -> None:
        """Keep what is believed about the clock."""

    def shorten_waits(self, now: int, batch: int) -> int:
        """Count the waits that began at a time that has not come yet, as a clock ahead
        of ours wrote it, and let them begin now: those of retries, of countdowns, and
        of cron runs put off by jitter.  An eta is a time, and stays.
        """


class WhyVerbs(Protocol):
    """What tells why.  All of one moment, and in bounded work: nothing is counted
    further than AHEAD_MOST, and no finished task is read but the one asked about.
    """

    def task_facts(self, task_id: int, now: int) -> TaskFacts:
        """What tells why a task is as it is; `task` is None where there is none.

        Raises TaskNotFound only for what cannot be an id.
        """

    def system_facts(self, now: int) -> SystemFacts:
        """What tells whether anything needs somebody."""


class Store(QueueVerbs, ProgramVerbs, PeopleVerbs, HistoryVerbs, WorkVerbs,
            WorkerVerbs, LiveVerbs, TimeVerbs, WhyVerbs, Protocol):
    """A queue.  Times are unix ms; an id, or a row, comes back as it is just now.

    All verbs raise DatabaseUnavailable where the queue cannot be used.
    """


# Who keeps a queue, by the scheme of the setting `db`; "" for the path of a file.
# Called with the settings, it returns a Store.
STORES: dict[str, Callable[[types.SimpleNamespace], Store]] = {}


def open_store(settings: types.SimpleNamespace) -> Store:
    """The store that keeps what `settings.db` names.  Raises SettingError."""
    scheme = settings.db.partition("://")[0] if "://" in settings.db else ""
    if scheme not in STORES:
        raise SettingError(f"db {settings.db}: nothing here keeps a queue at "
                           f"{scheme}://; give the path of a file")
    return STORES[scheme](settings)


# == Functions ================================================================
# Owns what a task may be made of: which functions, under which name, and whether
# two of them are one.  Knows nothing of tasks but their function and origin.


def _module_name(space):
    """Of a module's globals; that of a script is the name of its file."""
    module = space.get("__name__") or "?"
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, path = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:                # python -m package.module
            module = spec.name.removesuffix(".__main__") if spec.name else module
        elif path:
            module = os.path.splitext(os.path.basename(path))[0]
    return module


def default_name(fn):
    """module.function, as far as it has such a name."""
    if not hasattr(fn, "__qualname__"):
        return repr(fn)
    return f"{_module_name({'__name__': fn.__module__})}.{fn.__qualname__}"


def own_name(fn):
    """The default name of a function; an object has none that other processes know."""
    if not hasattr(fn, "__qualname__") or isinstance(fn, types.MethodType):
        raise OptionError(
            f"@task of {default_name(fn)}: it is no plain function, so it needs a "
            "name of its own: task(name=...)(it)"
        )
    return default_name(fn)


def _code_of(fn):
    """The code that a call runs, where it is Python."""
    while isinstance(fn, (functools.partial, types.MethodType)):
        fn = fn.func if isinstance(fn, functools.partial) else fn.__func__
    return getattr(fn, "__code__", getattr(type(fn).__call__, "__code__", None))


_CO_GENERATORS = 0x20 | 0x200       # of co_flags: def and async def that yield
_CO_COROUTINE = 0x80 | 0x100        # … and async def, or types.coroutine


def does_yield(fn):
    """True when a call of it only makes a generator."""
    code = _code_of(fn)
    return code is not None and bool(code.co_flags & _CO_GENERATORS)


def is_coroutine_function(fn):
    """True when a call of it makes a coroutine, as its code says."""
    code = _code_of(fn)
    return code is not None and bool(code.co_flags & _CO_COROUTINE)


def parameters_of(fn):
    """The names of its parameters, as in `def`; of C code there are none."""
    code = _code_of(fn)
    if code is None:
        return ()
    count, named = code.co_argcount, code.co_argcount + code.co_kwonlyargcount
    rest = iter(code.co_varnames[named:])
    some, more = ([star + next(rest)] if code.co_flags & bit else []
                  for bit, star in ((0x04, "*"), (0x08, "**")))
    names = code.co_varnames[isinstance(fn, types.MethodType):count]
    return (*names, *some, *code.co_varnames[count:named], *more)


def needs_arguments(fn):
    """True for a plain function that cannot be called without any."""
    if not isinstance(fn, types.FunctionType):
        return False
    code = fn.__code__
    only_named = code.co_varnames[code.co_argcount:][:code.co_kwonlyargcount]
    missing = set(only_named).difference(fn.__kwdefaults__ or ())
    return code.co_argcount > len(fn.__defaults__ or ()) or bool(missing)


def check_function(fn):
    """Refuse what can be called here, and can never do its work in a worker."""
    if not callable(fn) or isinstance(fn, type):
        raise OptionError(f"@task needs a function, not {fn!r}")
    path = getattr(fn, "__qualname__", "").split(".")
    if does_yield(fn):
        raise OptionError(
            f"@task of {default_name(fn)}: it yields, so a call of it does nothing: "
            "return a list"
        )
    if isinstance(fn, types.FunctionType) and len(path) > 1 and path[-2] != "<locals>":
        first = fn.__code__.co_varnames[:fn.__code__.co_argcount][:1]
        if first in (("self",), ("cls",)):
            raise OptionError(
                f"@task of {default_name(fn)}: a worker has no {first[0]} to give to "
                "a method: make it a function"
            )


def line_of(fn):
    """FILE:LINE of a function, for people."""
    code = getattr(fn, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(fn)


class _Origin(NamedTuple):
    """Which execution of which modules made a task: of its function, and of @task.

    They differ where a decorator of another module has wrapped the function.  A
    module that is executed again has a new __spec__ in the same globals.
    """

    names: tuple
    specs: tuple
    is_interactive: bool


def origin_of(fn):
    """Return the origin of a task that is being made of `fn`."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals is globals():
        frame = frame.f_back
    spaces = getattr(fn, "__globals__", {}), frame.f_globals
    return _Origin(
        (default_name(fn), *map(_module_name, spaces)),
        tuple(space.get("__spec__") for space in spaces),
        "__file__" not in frame.f_globals,
    )


def is_reload(old, new):
    """True when `new` is `old` defined again, by another execution of its module."""
    if old.fn is new.fn:
        return True
    if old.origin.names != new.origin.names:
        return False
    specs = zip(old.origin.specs, new.origin.specs)
    if any(before is not after for before, after in specs):     # they may be equal
        return True
    # In a session a name is for the newest; but <locals>.wrapper is no name.
    return new.origin.is_interactive and "<locals>" not in new.origin.names[0] \
        or _is_same_function(old.fn, new.fn)


def _is_same_function(a, b):
    """True for one `def` executed twice, with the same things around it.

    Also by `python -m package.module`, where the package has imported the module.
    """
    if not isinstance(a, types.FunctionType) or not isinstance(b, types.FunctionType):
        return False
    spaces = a.__globals__, b.__globals__
    is_one_file = spaces[0] is spaces[1] or spaces[1].get("__name__") == "__main__"
    return a.__code__ == b.__code__ and is_one_file \
        and _closure_of(a) == _closure_of(b)


def _closure_of(fn):
    """What it closes over, by identity, for that may change; and its defaults."""
    with contextlib.suppress(ValueError):       # a cell that is still empty
        cells = [
            id(cell.cell_contents)
            for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or ())
            if name != fn.__name__          # it calls itself
        ]
        return cells, fn.__defaults__, fn.__kwdefaults__
    return fn


# == Waiting ==================================================================
# Owns how often a waiting caller looks at what it waits for.  In asyncio one timer
# for each event loop and app looks for all that is awaited there, in statements
# of ID_BATCH ids.  What became of a task is found out by who awaits it.

_WAIT_SHORTEST, _WAIT_LONGEST = 0.001, 0.025    # seconds between two looks


def _longer(pause):
    return min(pause * 1.1, _WAIT_LONGEST)


def growing_pauses() -> Iterator[float]:
    """Seconds to sleep between two looks: short at first, then cheap."""
    pause = _WAIT_SHORTEST
    while True:
        yield pause
        pause = _longer(pause)


class _Batch(NamedTuple):
    """What is looked at together.  Those that are due at a time become one."""

    due: float              # by the clock of the loop
    number: int             # no two have the same, so that no more is compared
    pause: float            # seconds since the look before
    version: Any            # of the database at that look; None: there was none
    awaited: list           # (task id, future)

    @property
    def pending(self) -> list:
        """What was neither settled nor cancelled."""
        return [one for one in self.awaited if not one[1].done()]


class Watch:
    """The tasks that one event loop awaits of one app.  Only its thread comes here.

    It is in `watches` while something is awaited.  What was cancelled is dropped when
    it is next due; a loop that was closed in the middle, when another one begins.
    """

    def __init__(self, watches: dict, store: Callable, loop: Any):
        self._watches, self._store, self._loop = watches, store, loop
        self._batches: list[_Batch] = []        # a heap
        self._count = 0             # numbers given
        self._timer: Any = None     # at the first of the heap

    @classmethod
    def of(cls, watches: dict, store: Callable, loop: Any) -> Watch:
        """Return the one of this loop.  `store()` is asked at each look."""
        if loop not in watches:
            for other in list(watches):
                if other.is_closed():
                    watches.pop(other, None)
            watches[loop] = cls(watches, store, loop)
        return watches[loop]

    def change(self, task_id: int) -> Any:
        """Return a future that is done once the task has ended, or gone.

        It gets the error when nothing can be seen.
        """
        future = self._loop.create_future()
        self._put(_WAIT_SHORTEST, None, [(task_id, future)])
        self._wind()
        return future

    def _put(self, pause, version, awaited):
        due = self._loop.time() + pause
        if pause == _WAIT_LONGEST:          # all at the same moments, then
            due -= due % pause
        self._count += 1
        batch = _Batch(due, self._count, pause, version, awaited)
        heapq.heappush(self._batches, batch)

    def _wind(self):
        due = self._batches[0].due
        if self._timer is None or due < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(due, self._look)

    def _look(self):
        self._timer = None
        soon, due = self._loop.time() + _WAIT_SHORTEST / 2, []
        while self._batches and self._batches[0].due <= soon:
            due.append(heapq.heappop(self._batches))
        try:
            version = self._store().version()   # before the look: what comes is new
            left = self._look_for(due, version)
        except PyBgWorkerError as exc:
            left = {}
            for _, future in itertools.chain(*[batch.pending for batch in due]):
                future.set_exception(type(exc)(*exc.args))
        for pause, awaited in left.items():
            self._put(pause, version, awaited)
        if self._batches:
            self._wind()
        else:
            self._watches.pop(self._loop, None)

    def _look_for(self, due, version):
        """Settle what has ended; return what is left, by its next pause."""
        left = collections.defaultdict(list)
        for batch in due:
            awaited = batch.pending
            if batch.version != version:
                awaited = _unfinished(self._store(), awaited)
            if awaited:
                left[_longer(batch.pause)].extend(awaited)
        return left


def _unfinished(store, awaited):
    """Settle the futures of tasks that have ended; return the others."""
    found = set()
    for start in range(0, len(awaited), ID_BATCH):
        part = awaited[start:start + ID_BATCH]
        found |= store.unfinished([task_id for task_id, _ in part])
    for task_id, future in awaited:
        if task_id not in found:
            future.set_result(None)
    return [one for one in awaited if one[0] in found]


# == Results ==================================================================
# Owns what a program learns of a task that it has enqueued, by AsyncResult, and of
# the run that is going on in its own process, by current_task().

V = TypeVar("V")            # what a task returns


class Progress(NamedTuple):
    """How far a task has come, as it last said."""

    percent: float
    message: str | None


class _Unfinished(Exception):
    """There is no outcome yet, or no longer."""


class AsyncResult(Generic[V]):
    """A handle on one enqueued task; cheap, and good in any process.

    Every method raises TaskNotFound once the row is gone.  So does a handle that
    was got with conn= until the caller commits, and for ever after a rollback,
    whoever has got the id then.
    """

    default_app: App            # of a bare AsyncResult(id)

    def __init__(self, id: int, app: App | None = None, mark: str | None = None):
        self.id = id if type(id) is int else parse_id(str(id))
        self._app = app or AsyncResult.default_app
        self._mark = mark       # of our row, until it has been seen committed

    @property
    def _store(self):
        store = self._app.store
        if self._mark is not None:
            if not store.has_mark(self.id, self._mark):
                raise TaskNotFound(
                    f"no task {self.id}: its transaction is not committed, or was "
                    "rolled back, or it was deleted"
                )
            self._mark = None
        return store

    @property
    def task_id(self) -> int:
        """The same as .id."""
        return self.id

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id}>"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, AsyncResult) and self.id == other.id
            and self._app.store.path == other._app.store.path
        )

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def status(self) -> str:
        """scheduled, queued, running, retrying, success, failed or cancelled."""
        return self._store.task(self.id).status

    @property
    def attempt(self) -> int:
        """The number of the last run; 0 before the first."""
        return self._store.task(self.id).attempt

    @property
    def result(self) -> V | None:
        """What the task returned; None while, or when, it did not."""
        _, text, _ = self._store.outcome(self.id)
        return None if text is None else decode(text)

    @property
    def error(self) -> TaskError | None:
        """What ended the last run that failed, or None."""
        error = self._store.error(self.id)
        return TaskError(error) if error else None

    @property
    def progress(self) -> Progress | None:
        """(percent, message) as the task last set them, or None."""
        found = self._store.progress(self.id)
        return Progress(*found) if found else None

    def ready(self) -> bool:
        """True once it has finished, however it did."""
        return self._store.state(self.id) in FINISHED

    def successful(self) -> bool:
        """True once it has succeeded."""
        return self._store.state(self.id) == SUCCESS

    def failed(self) -> bool:
        """True once it has failed for good."""
        return self._store.state(self.id) == FAILED

    def cancelled(self) -> bool:
        """True once it has been cancelled."""
        return self._store.state(self.id) == CANCELLED

    def get(self, timeout: float | timedelta | None = None) -> V:
        """Wait for the end and return the result; at most `timeout` seconds.

        Raises TaskFailed, TaskCancelled, or WaitTimeout, which is a TimeoutError:
        then the task goes on.
        """
        deadline = None
        if timeout is not None:
            seconds = check_span("timeout", timeout, -math.inf, math.inf)
            deadline = time.monotonic() + seconds
        pauses = growing_pauses()
        while True:
            state = self._store.state(self.id)
            if state in FINISHED:
                with contextlib.suppress(_Unfinished):
                    return self._outcome()
            pause = next(pauses)
            if deadline is not None:
                pause = min(pause, deadline - time.monotonic())
                if pause <= 0:
                    raise WaitTimeout(
                        f"task {self.id} is {state_name(state)} after {seconds} s")
            time.sleep(pause)

    def __await__(self) -> Generator[Any, None, V]:
        return self._wait().__await__()

    async def _wait(self):
        import asyncio

        app, loop = self._app, asyncio.get_running_loop()
        while True:
            if self.ready():
                with contextlib.suppress(_Unfinished):
                    return self._outcome()
            await Watch.of(app.watches, lambda: app.store, loop).change(self.id)

    def _outcome(self):
        state, result, error = self._store.outcome(self.id)
        if state == SUCCESS:
            return None if result is None else decode(result)
        if state == FAILED:
            raise TaskFailed(self.id, TaskError(error or {"kind": "exception"}))
        if state == CANCELLED:
            raise TaskCancelled(f"task {self.id} was cancelled")
        raise _Unfinished       # somebody has retried it a moment ago

    def cancel(self) -> bool:
        """Cancel it, or have its worker end its run within a second.

        False when it has finished.
        """
        store = self._store
        return store.cancel(self.id, store.now(), _in_program()) not in FINISHED

    def retry(self) -> None:
        """Run a finished task again.  Raises TaskStateError when it is unfinished."""
        store = self._store
        store.retry(self.id, store.now(), _in_program())

    def forget(self) -> None:
        """Delete it with its result.  Raises TaskStateError while it runs."""
        self._store.forget(self.id)


def _in_program():
    """Who has written what this program does."""
    return By(login_name(), "program")


class CurrentTask:
    """The run that is going on in this process; see current_task()."""

    def __init__(self, id: int, name: str, attempt: int, due: float | None,
                 scheduled_for: datetime | None, report: Callable):
        self.id = id
        self.name = name
        self.attempt = attempt              # 1 for the first run
        self._due = due                     # monotonic: its time limit; None: none
        self.scheduled_for = scheduled_for  # the cron tick, UTC; None: no cron run
        self._report = report

    @property
    def deadline(self) -> float | None:
        """When its time limit is reached, in unix seconds; None: it has no limit.

        By the wall clock of now: who sets that does not change how long it may take.
        """
        return None if self._due is None else unix_time_of(self._due)

    def set_progress(self, percent: float, message: str | None = None) -> None:
        """Show how far the task has come, in AsyncResult.progress and `show`."""
        self._report(self, check_number("percent", percent, 0, 100), message)


# The run whose code this is, where there may be several in one process.  A thread that
# a task has started knows its owner by an attribute: it has no copy of the context.
running: contextvars.ContextVar[CurrentTask | None] = contextvars.ContextVar(
    "pybgworker.running", default=None)
in_flight: dict[CurrentTask, Any] = {}      # the runs of this process, until they end
_owned_threads: list[bool] = []             # not empty: there may be such threads


def current_task() -> CurrentTask | None:
    """Return the task that this code runs for; None outside of one.

    Also in the threads and asyncio tasks that it has started.  Where that cannot be
    known, it is the only task that runs in this process, if there is just one.
    """
    own = running.get()
    if own is None and _owned_threads:
        own = owner_of(threading.current_thread())
    if own is None:
        every = list(in_flight)
        own = every[0] if len(every) == 1 else None
    return own


def owner_of(thread: threading.Thread) -> CurrentTask | None:
    """The task that has started it, while that was known."""
    return getattr(thread, "_pybgworker_task", None)


def own_threads(streams: Sequence[Any] = ()) -> None:
    """From now on a thread belongs to the task that starts it.

    And a call in a pool of threads to the task that submits it: see own_calls().
    """
    start = threading.Thread.start

    @functools.wraps(start)
    def start_owned(self):
        own = current_task()
        if own is not None:
            self._pybgworker_task = own
            _owned_threads[:] = [True]
        own_calls(streams)      # a pool has its first thread for the first call
        start(self)

    threading.Thread.start = start_owned        # type: ignore[method-assign]
    own_calls(streams)


def own_calls(streams: Sequence[Any]) -> None:
    """Have ThreadPoolExecutor call for whoever submits, if somebody has imported it.

    A pool that a module keeps has threads of the first task that has used it, and
    serves all others.  These `streams` are flushed at the end of each call.
    """
    pool = getattr(sys.modules.get("concurrent.futures.thread"),
                   "ThreadPoolExecutor", None)
    if pool is None or hasattr(pool, "_pybgworker_owns"):
        return
    submit = pool.submit

    @functools.wraps(submit)
    def submit_owned(self, fn, /, *args, **kwargs):
        own = current_task()
        if own is not None:
            fn = functools.partial(_call_for, own, streams, fn)
        return submit(self, fn, *args, **kwargs)

    pool.submit, pool._pybgworker_owns = submit_owned, True


def _call_for(own, streams, fn, /, *args, **kwargs):
    token = running.set(own)
    try:
        return fn(*args, **kwargs)
    finally:
        for stream in streams:
            stream.flush()
        running.reset(token)


# == Tasks ====================================================================
# Owns what @task makes of a function: its options, and the ways to enqueue a call.
# Where the row of a call goes is the matter of the App.

if sys.version_info >= (3, 10):
    from typing import ParamSpec

    P = ParamSpec("P")
else:
    P = TypeVar("P")
R = TypeVar("R")    # what a call of the function returns: V, or a coroutine of it


class Task(Generic[P, R, V]):
    """A registered function.  Calling it calls the function, here and now."""

    def __init__(self, app: App, fn: Callable, name: str, options: dict):
        self.app = app
        self.fn = fn
        self.name = checked("name", parse_name, name)
        self.schedules: list = []       # of Schedule
        self.origin = origin_of(fn)
        check_known(options, TASK_OPTIONS)
        (self.queue, self.priority, self.timeout, self.rate_limit, self.max_running,
         self.on_success, self.on_failure, self.policy) = _checked_options(**options)
        functools.update_wrapper(self, fn, updated=())
        for attribute, value in getattr(fn, "__dict__", {}).items():
            if not hasattr(self, attribute):    # an option, or delay(), goes before
                setattr(self, attribute, value)

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<Task {self.name}>"

    @property
    def callbacks(self) -> int:
        """What there is to call at its ends: as in bg_task.

        Whoever listens hears of all tasks, but not of those that tell listeners.
        """
        own = sum(
            bit for bit, kind in CALLBACKS.values() if getattr(self, kind) is not None)
        if callback_kind(self.name) == self.name:
            return own
        return own + sum(LISTENED[kind] for kind in self.app.listeners)

    def companions(self) -> Iterator[Task]:
        """The tasks that call on_success and on_failure: NAME:on_failure."""
        for _, kind in CALLBACKS.values():
            fn = getattr(self, kind)
            if fn is not None:
                task: Task = Task(self.app, _calling(fn), self.name, {})
                task.name = f"{self.name}:{kind}"
                yield task

    def __reduce__(self) -> str:
        """Pickled as functions are: by the name under which its module has it."""
        return getattr(self, "__qualname__", self.name)

    def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[V]:
        """Enqueue a call; return its AsyncResult.

        Durable once it returns.  Raises PayloadTypeError for an argument that would
        not arrive as it was sent, PayloadTooLarge, and DatabaseUnavailable.
        """
        return self.app.enqueue(self, [(args, kwargs)], {})[0]

    def options(self, /, **options: Any) -> Call[P, V]:
        """Return something with delay() and delay_many() that uses these options.

        countdown (seconds) or eta (datetime); priority, queue, retries, timeout;
        key: while a task with it is unfinished, that one is returned; conn: an
        sqlite3 connection to the same file, in whose transaction to insert.
        """
        return Call(self, options)

    def apply_async(self, args: Sequence = (), kwargs: dict | None = None,
                    **options: Any) -> AsyncResult[V]:
        """The same as options(**options).delay(*args, **kwargs)."""
        if not isinstance(args, (tuple, list)) or not isinstance(kwargs or {}, dict):
            raise OptionError(
                f"apply_async({args!r}, {kwargs!r}): takes a tuple of positional and a "
                "dict of keyword arguments, as in apply_async((1, 2), {'key': 3}); "
                "delay(1, 2, key=3) takes them as they are"
            )
        return self.options(**options).delay(*args, **(kwargs or {}))

    def delay_many(self, calls: Iterable) -> list[AsyncResult[V]]:
        """Enqueue many calls in one transaction: all of them or none.

        Each call is a tuple of positional or a dict of keyword arguments.
        """
        return self.app.enqueue(self, [_one_call(call) for call in calls], {})


class Call(Generic[P, V]):
    """A task with options, ready to be enqueued."""

    def __init__(self, task: Task[P, Any, V], options: dict):
        check_known(options, CALL_OPTIONS)
        self._task, self._options = task, options

    def delay(self, /, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[V]:
        """Enqueue a call, as Task.delay() does."""
        return self._task.app.enqueue(self._task, [(args, kwargs)], self._options)[0]

    def delay_many(self, calls: Iterable) -> list[AsyncResult[V]]:
        """Enqueue many calls, as Task.delay_many() does."""
        found = [_one_call(call) for call in calls]
        return self._task.app.enqueue(self._task, found, self._options)


def _one_call(call):
    if isinstance(call, dict):
        if not all(isinstance(name, str) for name in call):
            raise OptionError(f"delay_many(): {call!r} has a keyword that is no text")
        return (), call
    if isinstance(call, (tuple, list)):
        return tuple(call), {}
    raise OptionError(
        f"delay_many() takes tuples and dicts, not {type(call).__name__}"
    )


def _calling(fn):
    """The function of a callback's task: makes a TaskError, drops the result."""
    async def wait_for(coroutine):
        await coroutine

    def call(task_id, *error):
        value = fn(task_id, *map(TaskError, error))
        return wait_for(value) if isinstance(value, types.CoroutineType) else None

    return call


def _checked_options(*, queue="default", priority=5, retries=3, retry_delay=1.0,
                     retry_backoff=2.0, retry_max_delay=3600.0, retry_jitter=0.1,
                     retry_for=(Exception,), timeout=None, rate_limit=None,
                     max_running=None, on_success=None, on_failure=None):
    """The options of @task as a Task keeps them."""
    classes = retry_for if isinstance(retry_for, (tuple, list)) else (retry_for,)
    if not all(isinstance(c, type) and issubclass(c, BaseException) for c in classes):
        raise OptionError(f"retry_for={retry_for!r}: must be exception classes")
    if rate_limit is not None:
        rate_limit = checked("rate_limit", parse_rate, rate_limit)
    policy = RetryPolicy(
        check_number("retries", retries, kind=int),
        check_span("retry_delay", retry_delay),
        check_number("retry_backoff", retry_backoff),
        check_span("retry_max_delay", retry_max_delay),
        check_number("retry_jitter", retry_jitter, most=1),
        tuple(classes),
    )
    return (
        checked("queue", parse_queue_name, queue), _check_priority(priority),
        _check_timeout(timeout), rate_limit,
        None if max_running is None
        else check_number("max_running", max_running, 1, kind=int),
        _check_callback("on_success", on_success),
        _check_callback("on_failure", on_failure), policy,
    )


TASK_OPTIONS = frozenset(_checked_options.__kwdefaults__ or ())


def new_task(task: Task, now: int, *, countdown=None, eta=None, priority=None,
             queue=None, retries=None, timeout=None, key=None, conn=None) -> NewTask:
    """The row of a call, by the options of the call before those of the task."""
    run_at = _due_at(now, countdown, eta)
    return NewTask(
        task.name,
        task.queue if queue is None else checked("queue", parse_queue_name, queue),
        task.priority if priority is None else _check_priority(priority),
        None if key is None else checked("key", parse_name, key),
        (task.policy.retries if retries is None
         else check_number("retries", retries, kind=int)),
        task.timeout if timeout is None else _check_timeout(timeout),
        SCHEDULED if run_at > now else QUEUED, max(run_at, 0), now,
        counted=countdown is not None,
    )


CALL_OPTIONS = frozenset(new_task.__kwdefaults__ or ())


def _check_timeout(value):
    seconds = None if value is None else check_span("timeout", value)
    if seconds == 0:
        raise OptionError("timeout=0: must be seconds above 0, or None for no limit")
    return seconds


def _check_priority(value):
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >> 31:
        raise OptionError(f"priority={value!r}: must be a whole number")
    return value


def _check_callback(name, value):
    if value is not None and (not callable(value) or does_yield(value)):
        raise OptionError(f"{name}={value!r}: must be a function that does not yield")
    return value


def _due_at(now, countdown, eta):
    """Unix ms from a countdown (seconds or timedelta) or an eta; now for neither."""
    if countdown is not None and eta is not None:
        raise OptionError("give countdown= or eta=, not both")
    if countdown is not None:
        return now + to_ms(check_span("countdown", countdown, -LONGEST_SECONDS))
    if eta is not None:
        if not isinstance(eta, datetime):
            raise OptionError(f"eta={eta!r}: must be a datetime (naive: local time)")
        try:
            return to_ms(eta.timestamp())
        except (ValueError, OverflowError):     # the year 1 or 9999, in local time
            raise OptionError(f"eta={eta!r}: is no time of this clock") from None
    return now


# == App ======================================================================
# Owns one registry of tasks and one database, and their meeting: @task and enqueue().
# The names of this module belong to a default App.


class App:
    """One registry of tasks and one database.  Keywords are settings."""

    serving = ""        # the module that a nursery or child imports just now

    def __init__(self, **settings: Any):
        self.tasks: dict[str, Task] = {}
        self._code: dict = {}
        self._flags: dict = {}
        # Settings and store, each as the first thread has made it.  No lock, for a
        # fork may come in the middle; configure() puts an empty one in its place.
        self._opened: dict[str, Any] = {}
        self.watches: dict = {}             # by event loop, see Watch
        self.listeners: dict[str, list[Callable]] = {}      # by what they listen to
        self.configure(**settings)

    def __copy__(self) -> App:
        """An app is one thing: its copies, and those of its results, share it."""
        return self

    def __deepcopy__(self, memo: dict) -> App:
        return self

    def __reduce__(self):
        """Pickled as its database: no other process has its functions."""
        return _app_on, (self.store.name,)

    # -- settings

    def configure(self, **settings: Any) -> None:
        """Set settings in code; flags and environment go before them.

        Raises SettingError for an unknown name or a value it cannot have; then none
        of them is set.
        """
        self._merge(self._code, settings)

    def suggest(self, **settings: Any) -> None:
        """Set those settings that configure() has not set."""
        self._merge(self._code, {
            name: settings[name] for name in settings.keys() - self._code
        })

    def override(self, **settings: Any) -> None:
        """Set settings as flags do: before the environment."""
        self._merge(self._flags, settings)

    def configured(self) -> dict:
        """The settings that code has set."""
        return dict(self._code)

    def _merge(self, target, settings):
        for name in settings.keys() - SETTING_BY_NAME:
            known = ", ".join(sorted(SETTING_BY_NAME))
            raise SettingError(f"unknown setting {name!r}; there are {known}")
        target.update({
            name: check_setting(name, value, name)
            for name, value in settings.items() if value is not None
        })
        before, self._opened = self._opened, {}
        if "store" in before:
            before["store"].close()

    @property
    def settings(self) -> types.SimpleNamespace:
        """All settings, resolved when first asked for."""
        opened = self._opened
        return opened.get("settings") or opened.setdefault(
            "settings", resolve_settings(self._code, dict(os.environ), self._flags))

    @property
    def store(self) -> Store:
        """The database, opened by the first thread that uses it."""
        opened = self._opened
        return opened.get("store") or opened.setdefault(
            "store", open_store(self.settings))

    # -- registering

    @overload
    def task(self, fn: Callable[P, Coroutine[Any, Any, V]], *, name: str | None = None,
             **options: Any) -> Task[P, Coroutine[Any, Any, V], V]: ...
    @overload
    def task(self, fn: Callable[P, R], *, name: str | None = None,
             **options: Any) -> Task[P, R, R]: ...
    @overload
    def task(self, fn: None = None, *, name: str | None = None,
             **options: Any) -> _Decorator: ...
    def task(self, fn: Any = None, *, name: str | None = None, **options: Any) -> Any:
        """Register a function as a task; with or without brackets.

        Raises AppError when another function has the name already.
        """
        if fn is None:
            return functools.partial(self.task, name=name, **options)
        schedules = []
        if isinstance(fn, Task):            # @task above @cron
            schedules = fn.schedules
            if self.tasks.get(fn.name) is fn:
                self._unregister(fn.name)
            fn = fn.fn
        check_function(fn)
        name = name or own_name(fn)
        try:
            task: Task = Task(self, fn, name, options)
        except OptionError as exc:
            raise OptionError(f"@task of {default_name(fn)}: {exc}") from None
        task.schedules = schedules
        return self._register(task)

    def _register(self, task):
        other = self.tasks.get(task.name)
        if other is not None and not is_reload(other, task):
            raise AppError(
                f"two tasks are named {task.name!r}: {line_of(other.fn)} and "
                f"{line_of(task.fn)}; give one of them @task(name=...), or their "
                "decorator functools.wraps()"
            )
        if callback_kind(task.name):
            raise AppError(
                f"task {task.name!r}: names with :on_success or :on_failure at the end "
                "are for the callbacks of tasks, and on:failure for who listens to them"
            )
        self._unregister(task.name)
        self.tasks[task.name] = task
        for companion in task.companions():
            self.tasks[companion.name] = companion
        return task

    def _unregister(self, name):
        for of in (name, name + ":on_success", name + ":on_failure"):
            self.tasks.pop(of, None)

    def cron(self, expr: str, tz: str = "UTC", misfire: str = "latest",
             overlap: str = "allow", jitter: float = 0.0,
             alert_after: Any = None) -> _Decorator:
        """Run a task without arguments whenever `expr` says so; see Cron.

        misfire: which missed ticks run later: latest, skip, all; overlap: allow, or
        skip a tick while the run before is unfinished; jitter: put each run off by
        a fixed part of so many seconds; alert_after: seconds, or "2h", after a tick
        by which a run must have succeeded, else the schedule is late, and that is
        said.  Raises CronError, also for a date that never comes.
        """
        return scheduled(self, expr, tz, misfire, overlap, jitter, alert_after)

    def on(self, kind: str) -> Callable[[Callable], Callable]:
        """Decorate a function that is to hear of runs that ended: `fn(event)`.

        kind: success (of a task), failure (for good), retry (another run follows), or
        a crash, timeout, or lost run, whatever follows it.  It is called in a child
        with a TaskEvent, after the end is committed.  Raises OptionError.
        """
        return listening(self, kind)

    # -- enqueueing

    def enqueue(self, task: Task, calls: list, options: dict) -> list[AsyncResult]:
        """Insert one row for each (args, kwargs); the work behind delay()."""
        if App.serving:
            _refuse_at_import(App.serving)
        row = new_task(task, self.store.now(), **options)
        if row.key is not None and len(calls) != 1:
            raise OptionError("key= is for one call: each call needs one of its own")
        limit = self.settings.max_payload
        texts = [_encode_call(args, kwargs, limit) for args, kwargs in calls]
        if not texts:
            return []
        if options.get("conn") is None:
            return [AsyncResult(n, self) for n in self.store.enqueue(row, texts)]
        ids, mark = self.store.enqueue_with(options["conn"], row, texts)
        return [AsyncResult(number, self, mark) for number in ids]

    def send(self, name: str, *args: Any, kwargs: dict | None = None,
             **options: Any) -> AsyncResult[Any]:
        """Enqueue a task by its name, which need not be registered here.

        Then it has the options of a bare @task, but for those that are given.
        `kwargs` are its keyword arguments.
        """
        check_known(options, CALL_OPTIONS)
        task = self.tasks.get(checked("name", parse_name, name))
        task = task or Task(self, do_nothing, name, {})
        return task.apply_async(args, kwargs, **options)

    def result(self, task_id: int) -> AsyncResult[Any]:
        """Return the AsyncResult of an id of this app's database."""
        return AsyncResult(task_id, self)


class _Decorator(Protocol):
    """What `@task(…)` is to a type checker."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, V]], /
                 ) -> Task[P, Coroutine[Any, Any, V], V]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Task[P, R, R]: ...


def _refuse_at_import(module):
    """Raise AppError that names the line of the app which enqueues at import."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    raise AppError(
        f"{frame.f_code.co_filename}:{frame.f_lineno}: this line enqueues while a "
        f"worker imports {module}, and would in each of its children; put it below "
        '`if __name__ == "__main__":`, or into a function'
    )


_apps_by_path: dict[str, App] = {}


def _app_on(path):
    """The default App, if that is its database; else one for all results of `path`."""
    if default_app.store.name == path:
        return default_app
    if path not in _apps_by_path:
        app = _apps_by_path[path] = App()
        app.override(db=path)       # whatever the environment says
    return _apps_by_path[path]


def _encode_call(args, kwargs, limit):
    text = encode_call(args, kwargs)
    if len(text) > limit:
        raise PayloadTooLarge(
            f"arguments of {len(text):,} bytes: PYBGWORKER_MAX_PAYLOAD allows "
            f"{limit:,}; pass the path of a file instead"
        )
    return text


def do_nothing():
    """Stands for a function that only a worker knows."""


AsyncResult.default_app = default_app = App()
task = default_app.task
cron = default_app.cron
on = default_app.on
configure = default_app.configure


###############################################################################
# BOOK TWO: THE QUEUE IN SQLITE
###############################################################################

# == Wake-up ==================================================================
# Owns the datagrams that tell a sleeping worker to look into the database now.
# They are hints: one that is lost, doubled or forged costs a look at most, for
# a worker also looks when PRAGMA data_version says that somebody committed.

_WAKE_TOKEN_BYTES = 8
_BAD_ADDRESS = (AttributeError, TypeError, ValueError, OverflowError)   # by hand


class WakeSocket:
    """A worker's ear: a UDP socket on the loopback interface, or none at all."""

    def __init__(self):
        self.token = os.urandom(_WAKE_TOKEN_BYTES).hex()
        self.port = 0
        self.socket = None
        try:
            self.socket = _socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.socket.bind(("127.0.0.1", 0))
            self.socket.setblocking(False)
            self.port = self.socket.getsockname()[1]
        except OSError:                     # a sandbox without a network
            self.close()

    def drain(self) -> bool:
        """Take all datagrams in.  True if one of them was meant for us."""
        heard = False
        while self.socket:
            try:
                heard |= self.socket.recv(64) == self.token.encode()
            except OSError:                 # nothing is left
                break
        return heard

    def close(self) -> None:
        """Stop listening.  May be called twice."""
        if self.socket:
            self.socket.close()
        self.socket = None


def send_wake_ups(addresses: Iterable[tuple[int, str]]) -> None:
    """Send a hint to each (port, token).  Never raises: it is a hint."""
    if not addresses:
        return
    # A socket of the moment costs 15 µs beside a commit's milliseconds, and there
    # is none to be shared by threads, inherited by forks, or closed by somebody.
    with contextlib.suppress(OSError), \
            contextlib.closing(_socket.socket(
                socket.AF_INET, socket.SOCK_DGRAM
            )) as sender:
        sender.setblocking(False)
        for port, token in addresses:
            with contextlib.suppress(OSError, *_BAD_ADDRESS):
                sender.sendto(token.encode(), ("127.0.0.1", port))


# == Files ====================================================================
# Owns what is asked of the database's file by its name: which file that is, whether
# SQLite may use it where it lies, whether its -wal is still there, and the words for
# what goes wrong with it.  Knows of no connection that stays open.

FORKED = (
    "database {}: the process forked in the middle of this: nothing was written, "
    "do it again"
)
GONE = (
    "database {}: it is gone: deleted, moved, or on a disk that is not mounted: bring "
    "it back, or start anew with a new process"
)
_MOST_DESCRIPTORS = 1 << 14     # that are tried where nobody lists them
_LONGEST_TICK_NS = 2_000_000_000    # of the clock of a file system
_NEW_FILE_MODE = 0o660              # less what the umask takes; others: nothing
# As mountinfo names them, without "fuse.": hosts, clusters, and what a desktop's
# virtual machine sees of its host (fakeowner to prl_fs: Docker, WSL, VMware …).
_NETWORK_FILESYSTEMS = frozenset((
    "acfs", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "davfs2", "gcsfuse",
    "gfs2", "glusterfs", "gpfs", "juicefs", "lustre", "mfs", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "rclone", "s3fs", "smb2", "smb3", "smbfs",
    "sshfs",
    "9p", "drvfs", "fakeowner", "grpcfuse", "osxfs", "prl_fs", "vboxsf", "virtiofs",
    "vmhgfs", "vmhgfs-fuse",
))


# Real paths that this process has opened.  A file that was there and is gone (a
# disk that is not mounted any more) is never made anew: that would be an empty
# queue, which gives the ids of the other once more.  True: our tables were in it.
KNOWN_PATHS: dict[str, bool] = {}


def absolute(path):
    """os.path.abspath().  Raises DatabaseUnavailable where the folder is gone."""
    try:
        return os.path.abspath(path)
    except OSError as exc:          # the working folder was deleted
        raise DatabaseUnavailable(
            f"database {path}: the current folder is gone: name it by a full path"
        ) from exc


def file_identity(path):
    """(device, inode), by stat: opening the file would drop SQLite's locks."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def count_names(path):
    """The number of names that a file has in its file system; 0: there is none."""
    try:
        return os.stat(path).st_nlink
    except OSError:
        return 0


def descriptors():
    """The descriptors of this process by the (device, inode) they are open on."""
    found: dict[tuple, set] = {}
    names: Iterable = ()
    try:
        names = os.listdir("/dev/fd")
    except OSError:                 # no /proc here
        with contextlib.suppress(AttributeError, ValueError, OSError):
            names = range(min(os.sysconf("SC_OPEN_MAX"), _MOST_DESCRIPTORS))
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            status = os.fstat(int(name))
            found.setdefault((status.st_dev, status.st_ino), set()).add(int(name))
    return found


def mount_table():
    """The text of this process's mount table; Linux, elsewhere empty."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


def _mount_of(path, mounts):
    """(mount point, file system type) of what holds `path`; ("", "") if unknown."""
    best, kind = "", ""
    for mount in mounts.splitlines():
        left, _, right = mount.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return best, kind


def check_place(path, mounts, allow_network_fs):
    """Refuse a file that SQLite would damage where, or as, it lies.

    Its -wal is found by the file's name.  One file with two names in different
    folders has two of them, and each program overwrites what the other wrote.
    """
    point, kind = _mount_of(path, mounts)
    if kind.removeprefix("fuse.") in _NETWORK_FILESYSTEMS and not allow_network_fs:
        raise DatabaseUnusable(
            f"database {path}: on a network file system ({kind}), where SQLite loses "
            "data: choose a local path with PYBGWORKER_DB, or set "
            "PYBGWORKER_ALLOW_NETWORK_FS=1"
        )
    if point == path and not os.path.isdir(path):
        raise DatabaseUnusable(
            f"database {path}: mounted as a single file, so its -wal is not the one "
            "that other programs see: mount the folder that it lies in"
        )
    if count_names(path) > 1 and not os.path.isdir(path):
        raise DatabaseUnusable(
            f"database {path}: a hard link gives it a second name, and SQLite loses "
            f"data by two names: remove the other (find -samefile {path})"
        )


class Undone(DatabaseUnavailable):
    """A transaction was undone for no fault of its own: do it again."""


def explained(exc, path):
    """Return the DatabaseUnavailable that says what to do about a sqlite3 error."""
    text = str(exc)
    if "closed database" in text:
        return Undone(FORKED.format(path))
    for words, kind, advice in (
        ("locked", DatabaseBusy, "another process holds its write lock"),
        ("interrupted", DatabaseBusy, "this takes too long: ask for less"),
        ("is full", DatabaseUnavailable, "free some disk space"),
        ("readonly", DatabaseUnavailable, "make the file and its folder writable"),
        ("unable to open", DatabaseUnavailable, "is there such a folder?"),
        ("already exists", DatabaseUnusable,
         "it is another program's: give us another file with PYBGWORKER_DB"),
        ("not a database", DatabaseUnusable, "it is some other file; name another"),
        ("malformed", DatabaseUnusable, "restore a backup, or sqlite3 FILE .recover"),
        ("no such table", DatabaseUnusable, "it was emptied while in use; restart"),
    ):
        if words in text:
            return kind(f"database {path}: {text}: {advice}")
    return DatabaseUnavailable(f"database {path}: {type(exc).__name__}: {text}")


def file_system(path):
    """The type of the file system that holds `path`, as ext4; "": nobody tells."""
    return _mount_of(path, mount_table())[1]


def open_beside(database, path, flags):
    """Open, or make, a file for exactly those who may write the database.

    Returns (descriptor, False when somebody else has put there what it opens): in a
    folder where others may write, that may be anything.  Raises OSError.
    """
    try:
        its = os.stat(database)
    except OSError:                     # none yet: for us alone
        its = os.stat_result((0o600, 0, 0, 1, os.geteuid(), -1, 0, 0, 0, 0))
    writers = its.st_mode & 0o222
    mode = 0o600 | writers | writers << 1
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(fd)
    is_known = found.st_uid in (0, os.geteuid(), its.st_uid) or writers & 0o022
    if not (stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and is_known):
        return fd, False
    with contextlib.suppress(OSError):      # of another owner: it is as he made it
        if os.geteuid() == 0 or mode & 0o060:
            owner = its.st_uid if os.geteuid() == 0 else -1
            os.fchown(fd, owner, its.st_gid)
        os.fchmod(fd, mode)
    return fd, True


def is_busy(exc):
    """True for the sqlite3 error of whoever came while another had the lock."""
    return "locked" in str(exc) or "busy" in str(exc)


def make_file(path):
    """Make an empty file that others cannot read: arguments may be secrets.

    By mknod, for closing a descriptor would drop SQLite's locks on a file that
    another thread has just opened.  Guarded by test_a_new_database_is_private.
    """
    if os.path.exists(path):
        return
    try:
        os.mknod(path, stat.S_IFREG | _NEW_FILE_MODE)
    except FileExistsError:
        pass
    except (AttributeError, OSError):       # Windows; macOS; some sandboxes
        try:
            sqlite3.connect(path).close()
            os.chmod(path, os.stat(path).st_mode & _NEW_FILE_MODE)
        except (sqlite3.Error, OSError) as exc:
            raise explained(exc, path) from exc


def check_exists(path):
    """Raise DatabaseUnavailable where there is no such file, or no way to it."""
    try:
        os.stat(path)
    except FileNotFoundError:
        raise DatabaseUnavailable(
            GONE.format(path) if path in KNOWN_PATHS else
            f"there is no database {path}: name one with --db or PYBGWORKER_DB"
        ) from None
    except OSError as exc:
        raise explained(exc, path) from exc


def connect_to(path: str, **options: Any) -> sqlite3.Connection:
    """Connect to a file that exists; sqlite3.connect(path) would make one."""
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    if os.sep != "/":
        name = "/" + name.replace(os.sep, "/")
    return sqlite3.connect(
        f"file://{name}?mode=rw", uri=True, timeout=0.005, isolation_level=None,
        **options,
    )


class WalFiles:
    """The -wal and -shm of `path` as they are now."""

    def __init__(self, path):
        self._file, self._path, self._shm_path = path, path + "-wal", path + "-shm"
        self._folder = os.path.dirname(path)
        self._identity = file_identity(path)
        self._wal = file_identity(self._path)
        self._shm = file_identity(self._shm_path)
        self._seen = None           # the folder's state with our -wal in it

    def is_there(self):
        """True while it is still the one that others read; one stat, of the folder.

        Whoever deletes or replaces the -wal changes the folder's times, and can put
        back but one of them (tar, rsync).  A stat of the -wal itself would cost the
        next write to it 25 µs: from Linux 6.13 on that must take a new time of its
        own then, and journal it.
        """
        try:
            folder = os.stat(self._folder)
            times = folder.st_mtime_ns, folder.st_ctime_ns
            seen = folder.st_dev, folder.st_ino, *times
            if seen == self._seen:
                return True
            log = os.stat(self._path)
        except OSError:
            return False
        found = log.st_dev, log.st_ino
        if self._wal is None:       # our first write has made it
            self._wal = found
        # A change of the same moment would look the same, for clocks have ticks: the
        # folder's has to be older than what we have just written to the log.
        # The topmost folder of a FAT has none at all: 0.
        is_old = 0 not in times and log.st_mtime_ns - max(times) > _LONGEST_TICK_NS
        self._seen = seen if is_old and found == self._wal else None
        return found == self._wal

    def lies_before(self, path):
        """True if SQLite would read this -wal together with that file."""
        return self._wal is not None and self._wal == file_identity(path + "-wal")

    def is_replaced(self):
        """True when another file lies there, and perhaps another -wal."""
        return file_identity(self._file) not in (None, self._identity)

    def is_stale(self):
        """True when both were deleted beside the file: others may have moved on.

        Where it is the -wal alone, SQLite saves what is in it.
        """
        return file_identity(self._file) == self._identity and \
            self._shm not in (None, file_identity(self._shm_path))


# == Guards ===================================================================
# Owns the locks that keep a database's -wal and -shm in place beside SQLite's own,
# which any close() of the file in this process drops: by a copy of it, a checksum,
# or by ours.  So whoever closes a Guard knows that nobody else here has the file open.

_READERS_LOCK = (0x40000002, 510)   # of the file; held by all who have it open
_SHM_LOCK = (128, 1)        # of the -shm; held by all who have it open
_WRITERS_LOCK = (120, 1)    # of the -shm; held inside a write transaction
# In the -shm: page size, frames in the -wal, how many of them are in the database.
# https://sqlite.org/walformat.html#the_wal_index_header
_LOG_STATE = struct.Struct("=14xHI76xI")
_FRAME_HEAD = 24            # bytes before each page in the -wal
_FLOCK = struct.Struct("hhqqi4x")   # type, whence, start, length, pid; Linux
_HAS_OWN_LOCKS = sys.platform.startswith("linux")   # others have another struct
_LOCK_TRIES = 20            # a millisecond apart: a last user closes the file now


class _OwnLock:
    """A read lock of some bytes of a file that no stray close() drops.

    It belongs to the open file, not to the process: forked children inherit it.
    With `only`, a (device, inode), it is about that file, whoever has its name.
    """

    def __init__(self, path: str, start: int, length: int, only: tuple | None = None):
        self._path, self._range, self._only = path, (start, length), only
        self.fd, self.identity = -1, None       # of the file that is open
        self._kept: dict[int, Any] = {}     # others not to be closed yet, identities
        self._fcntl: Any = None

    def lock(self) -> bool:
        """Lock the bytes in the file that has the name now.  False: impossible."""
        named = file_identity(self._path)
        wanted = self._only or named
        if not self.is_open() or self.identity != wanted:
            if not _HAS_OWN_LOCKS or named is None or named != wanted:
                return False
            self._open()
            if self.identity != wanted:         # it was replaced this moment
                return False
        for _ in range(_LOCK_TRIES):
            try:
                self.ask("F_OFD_SETLK", "F_RDLCK", *self._range)
                return True
            except BlockingIOError:
                time.sleep(0.001)
            except (OSError, AttributeError):
                break
        return False

    def unlock(self) -> None:
        """Let go of the bytes; a forked child that has this one does, too."""
        with contextlib.suppress(OSError, AttributeError):
            self.ask("F_OFD_SETLK", "F_UNLCK", *self._range)

    def ask(self, command: str, kind: str, start: int, length: int) -> tuple:
        """fcntl of this name, with a lock of this kind."""
        if not self.is_open():
            raise OSError(errno.EBADF, "not open")
        fcntl = self._fcntl
        lock = _FLOCK.pack(getattr(fcntl, kind), os.SEEK_SET, start, length, 0)
        return _FLOCK.unpack(fcntl.fcntl(self.fd, getattr(fcntl, command), lock))

    def is_open(self) -> bool:
        """True if the descriptor is ours still: some programs close all there are."""
        return self.fd >= 0 and file_identity(self.fd) == self.identity

    def is_nameless(self) -> bool:
        """True when the file is deleted, so that no lock of it matters any more."""
        return not (self.is_open() and os.fstat(self.fd).st_nlink)

    def _open(self):
        import fcntl

        self._fcntl = fcntl         # it cannot be imported while a program ends
        if self.is_nameless():      # else a close would drop SQLite's locks
            self.close()
        self.put_aside()
        with contextlib.suppress(OSError):
            self.fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            self.identity = file_identity(self.fd)

    @property
    def fds(self) -> set:
        """All descriptors of ours."""
        return {self.fd, *self._kept}

    def put_aside(self) -> None:
        """Use this descriptor no more; it cannot be closed yet."""
        if self.is_open():
            self._kept[self.fd] = self.identity
        self.fd, self.identity = -1, None

    def is_alone(self, found: dict) -> bool:
        """True if nobody but us has a file of these descriptors open here."""
        return all(found.get(identity, set()) <= self.fds
                   for identity in (self.identity, *self._kept.values()))

    def close(self) -> None:
        """Only where SQLite has no lock on this file."""
        self.put_aside()
        for fd, identity in self._kept.items():
            if file_identity(fd) == identity:
                os.close(fd)
        self._kept = {}


class Guard:
    """Keeps a file's -wal and -shm in place while a connection of ours is open.

    The last user that closes a file deletes its -wal, and by POSIX locks SQLite
    knows who the last is.  Any close() of the file in this process drops ours (a
    copy, a checksum), and then another program takes itself for the last: what we
    commit goes to a file without a name.  So we hold the same bytes by locks that
    no close() drops.  Guarded by test_a_stray_close_of_the_file_loses_nothing.

    Where there are none (macOS), what is left is that each commit asks whether its
    -wal is still there: it tells, but late, what others did at the same moment.
    """

    def __init__(self, path: str, identity: tuple):
        self.path = path
        self.is_held = False
        self.stays = False      # while others have the file open here: a caller
        self.is_shared = False  # and they were inherited by a child, as this is
        self._file = _OwnLock(path, *_READERS_LOCK, identity)
        self._shm = _OwnLock(path + "-shm", *_SHM_LOCK)

    @property
    def fds(self) -> set:
        """The descriptors of the file that are ours."""
        return self._file.fds

    def lock(self) -> bool:
        """Nobody can delete the -wal from now on.  False: impossible here."""
        self._shm.lock()        # there may be none yet
        self.is_held = self._file.lock()
        return self.is_held

    def unlock(self) -> None:
        """The last of our connections is about to be closed in good order."""
        if not self.is_shared:
            self.is_held = False
            self._file.unlock()
            self._shm.unlock()

    def is_open(self) -> bool:
        """True unless somebody has closed the descriptor that holds the lock."""
        return self._file.is_open()

    def share(self) -> None:
        """A child that is forked now relies on it for as long as it lives."""
        self.stays = self.is_shared = True

    def leave_to_parent(self) -> None:
        """In a forked child: the parent unlocks this when it likes."""
        self._file.put_aside()
        self._shm.put_aside()

    def is_useless(self, found: dict) -> bool:
        """True when the file was deleted, or nobody else has it open here.

        Then it can be closed: that drops no lock that matters.
        """
        return self._file.is_nameless() or (
            self._file.is_alone(found) and self._shm.is_alone(found))

    def close(self) -> None:
        """Let go of all.  Only of one that is useless."""
        self.unlock()
        self._file.close()
        self._shm.close()

    def is_writing(self) -> bool:
        """True while this process holds the write lock."""
        try:
            found = self._shm.ask("F_OFD_GETLK", "F_WRLCK", *_WRITERS_LOCK)
        except (OSError, AttributeError):       # there is no -shm
            return False
        return found[4] == os.getpid()

    def log_bytes(self) -> int | None:
        """How much of the -wal is not in the database yet; None: nobody says.

        Its size does not tell: it is overwritten from its beginning, not cut.
        """
        try:
            page, frames, moved = _LOG_STATE.unpack(
                os.pread(self._shm.fd, _LOG_STATE.size, 0))
        except (OSError, AttributeError, struct.error):
            return None             # there is no -shm, or we have no lock of it
        return max(0, frames - moved) * ((page if page > 1 else 1 << 16) + _FRAME_HEAD)

    def is_where_we_write(self) -> bool:
        """True in a transaction of this process on the files that lie there."""
        return self.is_writing() and os.access(self.path + "-wal", os.F_OK) and \
            self._shm.identity == file_identity(self.path + "-shm")


# == Open files ===============================================================
# Owns what this process has open: its connections by file, and the Guard that each
# file has meanwhile.  A close() of any descriptor would drop SQLite's locks, so a
# Guard is closed when nobody else here has the file open.

IN_TRANSACTION = (
    "this process was forked while a transaction on the file was open, so SQLite "
    "would wait for itself here for ever: end it before the fork"
)
WAL_LOST = (
    "its -wal was deleted while in use, and what this program wrote last is lost: "
    "never delete or copy its files by hand; restart all programs that use it"
)
_WITHOUT_WAL = (
    "a connection to the file is open in this process whose -wal was deleted, so "
    "SQLite would lose data here: close it before the fork, if there was one; else "
    "restart this program, which has opened the file for a copy, or the like"
)
LEFT_OPEN = (
    "this process was forked while a connection to the file was open, so SQLite "
    "would lose data here: close it before the fork"
)


def _leads_to(name):
    """A predicate of descriptors; Linux, elsewhere always false."""
    def leads(fd):
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/self/fd/{fd}") == name
        return False

    return leads


def _put_away_log(path):
    """Be the last that closes it, unless others have it open."""
    with contextlib.suppress(sqlite3.Error), \
            contextlib.closing(connect_to(path)) as connection:
        connection.execute("pragma schema_version").fetchall()


class OpenFiles:
    """The files that this process has open, by their (device, inode).

    For each: our connections, and the Guard that is held while there are any.
    """

    def __init__(self):
        self.refused = {}           # file: why it cannot be used here
        # Our connections (Links), by id().
        self.links: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
        self.users = {}             # threads that open or close a file, by token
        self.lock = threading.RLock()       # for users, and for the next
        self._guards = {}           # file: its Guard
        self._paths = {}            # file: its path; all that were ever used
        self._callers = set()       # files used by a caller's connection
        self._dangers = {}          # file: what the next child is to refuse

    def check(self, identity: tuple | None, path: str) -> None:
        """Refuse a file that cannot be used here; care for it at every fork."""
        reason = self.refused.get(identity)
        if reason:
            raise DatabaseUnusable(f"database {path}: {reason}")
        if identity is not None:
            self._paths[identity] = path

    def open_links(self) -> list:
        """Our connections that are open."""
        found = [ref() for ref in self.links.valuerefs()]
        return [link for link in found if link is not None and not link.is_closed]

    def has_others(self, identity: tuple) -> bool:
        """True where somebody else's connection is open before the first of ours.

        It may be inherited, from a fork before anybody told us of the file.
        """
        guard = self._guards.get(identity)
        return not (guard and guard.is_held or self._has_links(identity)) \
            and self._is_open(identity, descriptors())

    def hold(self, identity: tuple, path: str, has_others: bool) -> Guard | None:
        """Keep the files in place for as long as a connection of ours is open."""
        with self.lock:
            guard = self._guard(identity)
        if not has_others:
            return guard
        if guard:
            guard.stays = True      # our own locks may be inherited, and no locks
        is_lost = _leads_to(path + "-shm (deleted)")
        if any(map(is_lost, set().union(*descriptors().values()))):
            self.refused[identity] = _WITHOUT_WAL   # SQLite would use it still
            self.check(identity, path)
        return guard

    def is_away(self, identity: tuple) -> bool:
        """True when the whole database has left its place, and lives: see _reopen()."""
        return file_identity(self._paths[identity]) is None and any(
            os.fstat(fd).st_nlink for fd in descriptors().get(identity, ()))

    @contextlib.contextmanager
    def closing(self, identity: tuple):
        """A block that closes a connection, and tidies up if it is our last one.

        Then SQLite moves the -wal over and deletes it, if it is the last of all.
        """
        with self.lock:
            guard = self._guards.get(identity)
            if guard and not (guard.stays or self._has_links(identity)):
                guard.unlock()
            yield
            if guard and self._has_links(identity):    # opened by a handler
                guard.lock()
            elif guard and identity not in self._callers:
                guard.unlock()
        self.let_go()

    def let_go(self) -> None:
        """Close the Guards of files that nobody has open here any more.

        A thread of ours that opens one now would lose its locks, one of the app's
        still may: it gets the Guard back.  The log that a Guard kept in place when
        its last user closed the file is put away here.
        """
        with self.lock:
            idle = [item for item in list(self._guards.items())
                    if not self._has_links(item[0])]
            found = descriptors() if idle and not self._has_other_users() else None
            for identity, guard in idle:
                if found is not None and guard.is_useless(found):
                    self._close_guard(identity, guard)

    def _has_other_users(self):
        me = threading.get_ident()
        return any(ident != me for ident in list(self.users.values()))

    def _close_guard(self, identity, guard):
        guard.close()
        self._guards.pop(identity, None)
        self._callers.discard(identity)
        if guard.stays and file_identity(guard.path) == identity:
            _put_away_log(guard.path)
        if identity in descriptors():      # since this very moment
            self._guards[identity] = guard
            guard.stays = guard.lock()

    def is_held_for_caller(self, identity: tuple) -> bool:
        """True when hold_for_caller() was called, and all is as it was then."""
        guard = self._guards.get(identity)
        return guard is not None and guard.is_held and guard.is_open() and \
            identity in self._callers and guard.is_where_we_write()

    def hold_for_caller(self, identity: tuple, path: str) -> Guard | None:
        """Keep the files in place while the app's own connection is open.

        Nobody tells us when it is closed: let_go() looks.  None: impossible.
        """
        self.check(identity, path)
        with self.lock:
            guard = self._guard(identity)
            if guard:
                guard.stays = True
                self._callers.add(identity)
        return guard

    def end(self) -> None:
        """At the end of the program: what a caller's connections have open, too."""
        with self.lock:
            self.let_go()
            for identity in self._callers & set(self._guards):
                self._guards[identity].unlock()

    # -- at a fork

    def guard_what_is_open(self) -> None:
        """Guard the files of callers' connections, and of ours that are still in use.
        """
        self._dangers = {}
        found = descriptors() if self._paths else {}
        for identity, path in list(self._paths.items()):
            if file_identity(path) == identity and self._is_open(identity, found):
                guard = self._guard(identity)
                if guard is None:
                    self._dangers[identity] = LEFT_OPEN
                    continue
                guard.share()
                if guard.is_writing():
                    self._dangers[identity] = IN_TRANSACTION

    def _is_open(self, identity, found):
        guard = self._guards.get(identity)
        return bool(found.get(identity, set()) - (guard.fds if guard else set()))

    def keep(self, identity: tuple) -> bool:
        """Guard a file that a child uses which was just forked.  False: impossible."""
        guard = self._guard(identity)
        if guard:
            guard.share()
        return guard is not None

    def begin_in_child(self) -> None:
        """Only the thread that forked is left, and no lock of ours is held by it."""
        self.refused.update(self._dangers)
        if self._has_other_users():     # one that would not wait; see Forks.wait()
            self.refused.update(dict.fromkeys(self._paths, IN_TRANSACTION))
        self.links = weakref.WeakValueDictionary()
        self.users, self._dangers, self.lock = {}, {}, threading.RLock()
        for guard in self._guards.values():
            if not guard.is_shared:
                guard.leave_to_parent()
        self.let_go()

    def _guard(self, identity):
        """Keep the -wal of this file in place from now on; None: impossible."""
        path = self._paths[identity]
        guard = self._guards.get(identity)
        if guard is None:
            if self._guards:
                self.let_go()
            guard = self._guards[identity] = Guard(path, identity)
        return guard if guard.lock() else None

    def _has_links(self, identity):
        return any(link.identity == identity for link in self.open_links())


FILES = OpenFiles()


# == Forks ====================================================================
# Owns what a fork must not break.  SQLite keeps a table of its process's locks,
# and a forked child inherits the table, but not the locks: a connection that it
# opens takes none, and the next to close deletes the -wal that it writes to.  So
# no connection of ours is open while the process forks: the fork waits for those
# in use and closes all, and each opens again when it is used.  Guards stand in for
# locks that a child cannot rely on.
# https://sqlite.org/howtocorrupt.html, 2.2 and "Carrying an open database connection"

_FORK_PATIENCE = 5.0        # seconds that a fork waits for transactions to end
_HOOKS_PATIENCE = 1.0       # that they wait for a fork, once it is ready for them
_EXIT_PATIENCE = 1.0        # that the end of a program waits for its daemon threads
_NO_HOOKS = (
    "this process was forked while the file was open, by code that runs no Python "
    "fork hooks, so SQLite would lose data here: use it only after such a fork"
)


def _adapts():
    """True where the app has an adapter, which may fork, for what we give SQLite."""
    return any(kind in (str, int, float, bytearray) for kind, _ in sqlite3.adapters)


class StepAside(PyBgWorkerError):
    """Raised where a thread waits for a lock while another one forks."""


def nobody(*_):
    """Stands for a weak reference whose object is gone."""


class Forks:
    """Where this process stands among its forks, and who waits for one."""

    def __init__(self):
        self.count = 0              # of forks that led to this process
        self._pid = os.getpid()
        self.is_leaving = False     # the program ends
        self._is_watching = False
        self._forking = []          # threads that fork now, or wait to do so
        self._closing = []          # those of them that close our connections now
        self._impatient = set()     # threads that wait for no fork any more
        self._one_fork = threading.RLock()  # from _before() to the hooks after it

    def generation(self) -> int:
        """A number that is another one after a fork, whoever forked."""
        if self._pid != os.getpid():
            self._after_in_child()
        return self.count

    def check(self, identity: tuple | None, path: str) -> None:
        """Refuse a file that cannot be used here; care for it at every fork."""
        self.generation()
        FILES.check(identity, path)
        self._watch()

    def _watch(self):
        if not self._is_watching and hasattr(os, "register_at_fork"):
            self._is_watching = True        # not at import, which has no effects
            os.register_at_fork(
                before=self._before, after_in_parent=self._after_in_parent,
                after_in_child=self.generation,     # a hook before it may have asked
            )
            atexit.register(self._leave)

    def _leave(self):
        """Close in good order what the interpreter would only drop.

        Daemon threads run on, and begin nothing as long as this waits for what they
        are in the middle of; a close() then would be a crash.
        """
        self.is_leaving = True
        self._forking.append(threading.get_ident())     # for good; see wait()
        self._close_all(_EXIT_PATIENCE)
        FILES.end()

    # -- for those who use a file

    def is_on(self) -> bool:
        """True while another thread forks: begin nothing."""
        if not self._forking:
            return False
        me = threading.get_ident()
        return me not in self._forking and (
            bool(self._closing) or me not in self._impatient)

    def wait(self) -> None:
        """Let the fork happen; not for ever.

        A hook of the app's may wait for a lock, and we are called by who has it.  A
        child that is forked while we go on is told so.  Guarded by
        test_a_fork_hook_may_wait_for_a_thread_that_waits_for_the_fork, and by
        test_a_fork_hook_may_wait_for_a_thread_that_reads_on.
        """
        deadline = time.monotonic() + _HOOKS_PATIENCE
        while self.is_on():
            if time.monotonic() > deadline:
                self._impatient.add(threading.get_ident())
            time.sleep(0.001)

    def be_patient(self) -> None:
        """Wait for this fork once more: a thread that ends has given back its locks."""
        self._impatient.discard(threading.get_ident())

    @contextlib.contextmanager
    def using(self):
        """A fork waits for the end of this block; not for long."""
        token, is_inside = object(), self._is_inside()
        try:
            while True:
                with FILES.lock:    # let_go() looks for us
                    FILES.users[token] = threading.get_ident()
                if is_inside or not self.is_on():
                    break
                del FILES.users[token]
                self.wait()
            yield
        finally:
            FILES.users.pop(token, None)

    def _is_inside(self):
        """True for a thread that a fork waits for already."""
        ident = threading.get_ident()
        return ident in list(FILES.users.values()) or any(
            link.is_busy for link in FILES.open_links() if link.thread == ident)

    # -- the fork itself

    def _before(self):
        """Let nobody begin, wait for those who have begun, and close all."""
        self.generation()
        self._forking.append(threading.get_ident())
        self._one_fork.acquire(timeout=_FORK_PATIENCE)
        self._close_all(_FORK_PATIENCE)
        with FILES.lock:
            FILES.guard_what_is_open()

    def _close_all(self, patience):
        self._closing.append(threading.get_ident())
        try:
            deadline = time.monotonic() + patience
            while self._is_busy() and time.monotonic() < deadline:
                time.sleep(0.0005)
            for link in FILES.open_links():
                if link.generation == self.count and not self._is_in_a_call(link):
                    link.close()
        finally:
            self._closing.remove(threading.get_ident())

    def _after_in_parent(self):
        for link in FILES.open_links():     # a later hook of the app's has used it
            FILES.keep(link.identity)
        with contextlib.suppress(ValueError, RuntimeError):     # _watch() came later
            self._impatient.clear()
            self._forking.remove(threading.get_ident())
            self._one_fork.release()

    def _is_busy(self):
        """True while a thread that does not fork uses a file."""
        return any(ident not in self._forking for ident in list(FILES.users.values())) \
            or any(map(self._is_others, FILES.open_links()))

    def _is_others(self, link):
        return link.is_busy and link.thread not in self._forking

    def _is_in_a_call(self, link):
        """It may be in the middle of a call of SQLite, where a close() is a crash.

        A thread that forks is between two calls: in a signal handler, say.  SQLite
        calls no Python code for us, but for adapters of what it is given.  Guarded by
        test_a_fork_within_a_call_of_sqlite_closes_nothing.
        """
        return self._is_others(link) or link.is_busy and _adapts()

    def _after_in_child(self):
        """Only the thread that forked is left, and no lock of ours is held by it."""
        for link in FILES.open_links():
            link.leak()
            if not self._forking:
                FILES.refused[link.identity] = _NO_HOOKS
            elif link.is_busy:
                FILES.refused[link.identity] = IN_TRANSACTION
            elif not FILES.keep(link.identity):
                FILES.refused[link.identity] = LEFT_OPEN
        FILES.begin_in_child()
        self._forking, self._closing, self._impatient = [], [], set()
        self._one_fork = threading.RLock()
        self.count += 1
        self._pid = os.getpid()


FORKS = Forks()


class Link:
    """One thread's connection, with what must be remembered beside it."""

    def __init__(self, connection, identity):
        self.connection = connection
        self.identity = identity
        self.wal = None             # the WalFiles that it writes to
        self.guard = None           # that keeps them in place
        self.thread = threading.get_ident()
        self.generation = FORKS.count
        self.is_closed = False
        self.synchronous = None     # what the pragma was last set to
        self.commits = 0
        self.undone = True          # the last transaction was, or never began
        self.writer = nobody        # weak reference to the Transaction that is open
        self.is_reading = False
        self.wake = []              # whom to wake after the commit
        self.is_stale = False       # opened while the file could not be written
        FILES.links[id(self)] = self

    @property
    def is_busy(self):
        """True from before its thread uses SQLite until after."""
        return self.is_reading or self.writer() is not None

    @property
    def is_open(self):
        """True in a transaction."""
        try:
            return self.connection.in_transaction
        except sqlite3.ProgrammingError:        # a fork has closed it
            return False

    def close(self):
        """Undo what is open, and close.  May be called twice."""
        if self.is_closed:
            return
        if self.is_open:            # what a cursor holds open would stay a transaction
            self.roll_back()
        if self.wal is not None and (self.wal.is_replaced() or self.wal.is_stale()):
            if self.wal.is_stale():
                FILES.refused[self.identity] = WAL_LOST
            self.leak()         # a close would delete, or overwrite, what is newer
            return
        FORKS.be_patient()
        with FORKS.using():     # a child that is forked before that inherits it open
            if not self.is_closed:
                self.is_closed = True
                with FILES.closing(self.identity), contextlib.suppress(sqlite3.Error):
                    self.connection.close()

    def roll_back(self):
        """Leave no transaction open; some errors have already rolled back."""
        self.undone = True
        if not self.is_closed and self.is_open:
            with contextlib.suppress(sqlite3.Error):
                self.connection.execute("rollback")

    def leak(self):
        """Leave it open for ever: a close would unlock, or delete, others' files."""
        import ctypes

        self.is_closed = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.connection))

    def __del__(self):
        # The module's names are gone when the interpreter ends: SQLite closes it.
        if FORKS is None or self.is_closed:
            return
        if self.generation == FORKS.generation():
            self.close()
        else:                       # this very moment it was forked
            self.leak()


# == Schema ===================================================================
# Owns the tables in the file, and the steps from one version of them to the next.
# Knows what a column holds, not who asks for it.

_SCHEMA = (
    """
create table bg_task (
    id          integer primary key,  -- never used twice, see bg_meta.last_id
    state       integer not null,     -- 0 scheduled 1 retrying 2 queued 3 running
                                      -- 4 success 5 failed 6 cancelled
    queue       text not null,        -- name of the queue it waits in
    name        text not null,        -- name of the task, as @task registered it
    priority    integer not null,     -- lower runs first
    place       integer not null default 0,  -- then lower; then lower id.  Rises
                                      -- when a retry queues again: bg_meta.place
    key         text,                 -- one unfinished row per key; null: no key
    attempt     integer not null default 0,  -- runs claimed so far; fencing token
    retries     integer not null,     -- runs allowed after the first
    forgiven    integer not null default 0,  -- attempts that do not count
    timeout     real,                 -- seconds a run may take; null: no limit
    worker      integer,              -- bg_worker.id that claimed it last
    cancel_asked integer not null default 0, -- 1: its worker shall end the run
    callbacks   integer not null default 0,  -- sum of 1 on_success 2 on_failure, and
                                      -- of LISTENED; set at the claim, for whoever
                                      -- ends the run
    run_at      integer not null,     -- unix ms; due, and ready, from then on
    counted     integer not null default 0, -- 1: run_at was counted from created_at
    created_at  integer not null,     -- unix ms of delay()
    started_at  integer,              -- unix ms the last run began
    finished_at integer,              -- unix ms; null until finished
    duration    real,                 -- seconds the last run took
    tick        integer,              -- unix s of the cron tick; null: no cron
    args        text,                 -- [args, kwargs]; null: in bg_payload
    result      text,                 -- null: none yet, or in bg_payload
    -- An edit by hand to what no program could mean is refused there and then.
    check (id between 1 and 1e15), check (place between 0 and 1e15),
    check (typeof(queue) = 'text'), check (typeof(name) = 'text'),
    check (state between 0 and 99), check (priority between -1e10 and 1e10),
    check (typeof(attempt) = 'integer' and attempt between 0 and 1e9),
    check (retries between 0 and 1e12), check (forgiven between 0 and 1e9),
    check (timeout is null or timeout between 0 and 1e12),
    check (run_at between 0 and 1e16), check (created_at between 0 and 1e16),
    check (started_at is null or started_at between 0 and 1e16),
    check (finished_at is null or finished_at between 0 and 1e16),
    check (tick is null or typeof(tick) = 'integer' and tick between -1e12 and 1e12)
)""",
    # A row is in the index of its state, and in none once it is finished, so
    # history costs nothing.  What is ready is in two: in the order of claims, and
    # by group, so that what cannot run now is passed over in one seek.
    f"""create index bg_delayed on bg_task (run_at) where state < {QUEUED}""",
    f"""create index bg_ready on bg_task (priority, place) where state = {QUEUED}""",
    f"""create index bg_group on bg_task (queue, name, priority, place)
        where state = {QUEUED}""",
    f"""create index bg_running on bg_task (worker) where state = {RUNNING}""",
    f"""create unique index bg_key on bg_task (key)
        where key is not null and state < {SUCCESS}""",
    """
create table bg_payload (             -- what is too large for the hot row
    id          integer primary key,  -- task id * 8 + kind: 0 args 1 result
                                      -- 2 error 3 output 4 progress
                                      -- 5 mark 6 attempts 7 outputs of those
    body        text not null         -- JSON; plain text for output and mark
)""",
    """
create table bg_worker (
    id          integer primary key autoincrement,  -- never used twice; also the
                                      -- byte it locks in the file *-live
    name        text not null,        -- worker_name, for people
    pid         integer not null,     -- of the worker process
    host        text not null,        -- where it runs
    boot        text not null,        -- id of that machine's boot; '' unknown
    port        integer not null,     -- UDP, loopback; 0: polls only
    token       text not null,        -- what a wake-up datagram must say
    queues      text,                 -- JSON array it serves; null: all
    concurrency integer not null,     -- children
    started_at  integer not null,     -- unix ms
    beat_at     integer not null,     -- unix ms of the last heartbeat
    running     integer not null default 0, -- tasks in hand at that heartbeat
    live        integer not null default 0, -- inode of the *-live whose byte it has
                                      -- locked; 0: unknown, only its beats count
    check (beat_at between 0 and 1e16), check (started_at between 0 and 1e16)
)""",
    """create index bg_beat on bg_worker (beat_at) where port > 0""",
    """
create table bg_schedule (
    task        text not null,        -- name of the task to enqueue
    expr        text not null,        -- cron expression
    tz          text not null,        -- IANA name
    number      integer not null,     -- 0; 1, 2 … for further ones that are equal
    misfire     text not null,        -- latest, skip or all
    overlap     text not null,        -- allow or skip
    jitter      real not null,        -- seconds; 0: none
    next_tick   integer,              -- unix s; null: never
    last_tick   integer,              -- unix s of the last one enqueued
    done        text not null,        -- JSON, see plan_ticks()
    set_at      integer not null,     -- unix ms when next_tick was written
    seen_at     integer not null,     -- unix ms a worker last registered it
    primary key (task, expr, tz, number),
    check (misfire in ('latest', 'skip', 'all')), check (overlap in ('allow', 'skip')),
    check (jitter between 0 and 1e12), check (set_at between 0 and 1e16),
    check (next_tick is null or next_tick between -1e12 and 1e12),
    check (last_tick is null or last_tick between -1e12 and 1e12),
    check (seen_at between 0 and 1e16), check (typeof(done) = 'text')
) without rowid""",
    """create index bg_schedule_due on bg_schedule (next_tick)""",
    """create index bg_schedule_set on bg_schedule (set_at)""",
    """
create table bg_rate (
    name        text primary key,     -- task name; '' is the limit over all
    tat         real not null,        -- unix ms, see rate_tokens()
    check (tat between 0 and 1e16)
) without rowid""",
    """
create table bg_queue (
    name        text primary key,     -- a queue that is paused
    paused_at   integer not null      -- unix ms
) without rowid""",
    """
create table bg_meta (
    name        text primary key,     -- last_id, schema, place, clock, clock_doubted,
                                      -- rolled_to, worker_cpu, children_cpu
    value       integer not null,     -- the highest task id ever deleted; the
                                      -- version of these tables; the place of the
                                      -- last retry that queued again; see ClockView;
                                      -- unix s up to which minutes are rolled up; ms
                                      -- of CPU that workers have used who left
    check (value between 0 and 1e15)
) without rowid""",
    """insert into bg_meta values ('last_id', 0), ('schema', 0), ('place', 0)""",
)
_SCHEMA_2 = (
    """alter table bg_task add column
    alone       integer not null default 0  -- 1: its last run died among others, so
                                      -- that the next has a child to itself.  No
                                      -- check: it would read the whole table here
    """,
    """alter table bg_worker add column
    start_method text not null default ''  -- of its children, and why; '' unknown
        check (typeof(start_method) = 'text')""",
    # What needs a child to itself is in an index of its own, and in no other: a look
    # that has no such child finds none of it, however much there is.
    """drop index bg_ready""",
    """drop index bg_group""",
    f"""create index bg_ready on bg_task (priority, place)
        where state = {QUEUED} and alone = 0""",
    f"""create index bg_group on bg_task (queue, name, priority, place)
        where state = {QUEUED} and alone = 0""",
    f"""create index bg_alone on bg_task (priority, place)
        where state = {QUEUED} and alone <> 0""",
    # With the name: how many run of one is counted with a seek for each worker.
    """drop index bg_running""",
    f"""create index bg_running on bg_task (worker, name) where state = {RUNNING}""",
)
_BUCKETS = "".join(f"""
    {kind}{n} integer not null default 0,""" for kind in "rw"
    for n in range(len(HISTORY_BOUNDS) + 1))
_WORDS = f"""case state when {SCHEDULED} then 'scheduled'
            when {RETRYING} then 'retrying' when {QUEUED} then 'queued'
            when {RUNNING} then 'running' when {SUCCESS} then 'success'
            when {FAILED} then 'failed' when {CANCELLED} then 'cancelled'
            else state end"""


def _iso(column, per_second=1000):
    """SQL for a time of ours as a view shows it."""
    return f"strftime('%Y-%m-%dT%H:%M:%fZ', {column} / {per_second}.0, 'unixepoch')" \
        f" as {column}"


# What operators look at.  The tables of what runs now are of a second ago at most,
# and hold only what has run for longer than that.
_SCHEMA_3 = (
    # Of those that ended badly, so that the newest, and those of a name, are found.
    f"""create index bg_bad on bg_task (state, finished_at, name, queue)
        where state > {SUCCESS}""",
    """alter table bg_task add column
    meta        text                  -- JSON of options(meta=); null: none
    """,
    f"""
create table bg_history (             -- runs that ended
    span        integer not null,     -- 60, 900 or 86400 s; 0: since ever
    at          integer not null,     -- unix s of its start; 0 for span 0
    name        text not null,        -- of the task
    queue       text not null,        -- of those tasks
    lo          integer not null,     -- the lowest task id in it, and the highest: to
    hi          integer not null,     -- find the tasks of a rare name
    runs        integer not null default 0,  -- all that ended
    failed      integer not null default 0,  -- … for good, or
    retried     integer not null default 0,  -- … with another run to come, or
    cancelled   integer not null default 0,  -- … by a cancellation
    exceptions  integer not null default 0,  -- ended badly: by an exception
    crashed     integer not null default 0,  -- … with their child
    timeouts    integer not null default 0,  -- … at their limit
    lost        integer not null default 0,  -- … with their worker
    aborted     integer not null default 0,  -- … by Abort
    ran_ms      integer not null default 0,  -- sum of what they took
    waited_ms   integer not null default 0,  -- sum of what they waited since due
    -- Runs by what they took (r) and waited (w): see HISTORY_BOUNDS.{_BUCKETS}
    primary key (span, at, name, queue)
) without rowid""",
    """
create table bg_worker_task (         -- what a worker knows
    worker      integer not null,     -- bg_worker.id
    name        text not null,        -- of the task
    rate        real,                 -- starts per second; null: no limit
    max_running integer,              -- runs at a time, over all workers; null: any
    params      text,                 -- JSON array of its function's parameters
    primary key (worker, name)
) without rowid""",
    """
create table bg_child (               -- as of its worker's last heartbeat
    worker      integer not null,     -- bg_worker.id
    pid         integer not null,     -- of its process
    running     integer not null,     -- runs that it has begun
    memory      integer not null,     -- bytes resident
    cpu         real not null,        -- seconds used
    primary key (worker, pid)
) without rowid""",
    """
create table bg_run (                 -- what a worker has had in hand for a second
    task        integer primary key,  -- bg_task.id
    worker      integer not null,     -- bg_worker.id
    attempt     integer not null,     -- as in bg_task
    pid         integer not null,     -- of its child
    began_at    integer,              -- unix ms; null: it waits in that child's pipe
    behind      integer               -- task that it waits for there; null: none
)""",
    """create index bg_run_worker on bg_run (worker)""",
    """
create table bg_output (              -- what a run has printed so far
    task        integer not null,     -- bg_task.id
    attempt     integer not null,     -- which run of it
    seq         integer not null,     -- characters that it had printed before
    at          integer not null,     -- unix ms it was written here
    body        text not null,        -- a part of what was printed
    primary key (task, attempt, seq)
) without rowid""",
    """
create table bg_event (               -- what people have done, and what they missed
    id          integer primary key,  -- the newest 10,000 are kept
    at          integer not null,     -- unix ms
    who         text not null,        -- login name, or what user() said
    how         text not null,        -- cli, web, program, worker
    action      text not null,        -- pause, resume, retry, cancel, late …
    target      text not null,        -- a task id, a queue, a schedule, a filter
    detail      text                  -- a reason, a count; null: none
)""",
    # A comment after a column would hide from SQLite what it appends there.
    """alter table bg_queue add column   -- who paused it; null: unknown
    paused_by   text""",
    """alter table bg_queue add column   -- why; null: not said
    reason      text""",
    """alter table bg_worker add column  -- starting, ready or stopping
    state       text""",
    """alter table bg_worker add column  -- its trouble, for people; null: none
    note        text""",
    """alter table bg_worker add column  -- bytes resident; null: unknown
    memory      integer""",
    """alter table bg_worker add column  -- seconds of CPU of its own process
    cpu         real""",
    """alter table bg_worker add column  -- … of all its children, dead ones too
    children_cpu real""",
    """alter table bg_worker add column  -- starts per second of all tasks
    rate        real""",
    """alter table bg_worker add column  -- of this program
    version     text""",
    """alter table bg_worker add column  -- bytes a child may use; null: no limit
    max_memory  integer""",
    """alter table bg_worker add column  -- limit of a run whose task has none, in
    timeout     real""",                # seconds; null: none
    """alter table bg_schedule add column  -- the last task that it enqueued
    last_id     integer""",
    """alter table bg_schedule add column  -- unix ms one of its last succeeded
    success_at  integer""",
    """alter table bg_schedule add column  -- late so many seconds after a tick
    alert_after real""",                    # without a success; null: never
    """alter table bg_schedule add column  -- unix ms a worker first registered it
    since       integer""",
    f"""create view v_tasks as select id, {_WORDS} as status, name, queue, priority,
        key, attempt, retries, timeout, {_iso("created_at")}, {_iso("run_at")},
        {_iso("started_at")}, {_iso("finished_at")}, duration, meta
    from bg_task""",
    f"""create view v_failures as select t.id, t.name, t.queue, t.attempt,
        {_iso("finished_at")}, json_extract(p.body, '$.kind') as kind,
        json_extract(p.body, '$.type') as type,
        json_extract(p.body, '$.message') as message
    from bg_task as t left join bg_payload as p
        on p.id = t.id * 8 + 2 and json_valid(p.body)
    where t.state = {FAILED} and t.state > {SUCCESS}""",    # for bg_bad
    f"""create view v_history as select span, {_iso("at", 1)}, name, queue, runs,
        runs - failed - retried - cancelled as succeeded, failed, retried, cancelled,
        exceptions, crashed, timeouts, lost, aborted, ran_ms / 1000.0 as ran_seconds,
        waited_ms / 1000.0 as waited_seconds
    from bg_history""",
    f"""create view v_queues as select w.queue,
        count(case state when {SCHEDULED} then 1 end) as scheduled,
        count(case state when {RETRYING} then 1 end) as retrying,
        count(case state when {QUEUED} then 1 end) as queued,
        count(case state when {RUNNING} then 1 end) as running,
        q.name is not null as paused, q.paused_by, q.reason
    from (select queue, state from bg_task where state < {QUEUED}
        union all select queue, state from bg_task
            where state = {QUEUED} and alone = 0
        union all select queue, state from bg_task
            where state = {QUEUED} and alone <> 0
        union all select queue, state from bg_task where state = {RUNNING}
        union all select name, null from bg_queue) as w
        left join bg_queue as q on q.name = w.queue
    group by w.queue""",
)
# _MIGRATIONS[n] takes a database from schema n to n + 1.  Our version is kept in
# bg_meta: user_version is for the program whose file it may be.
_MIGRATIONS = (_SCHEMA, _SCHEMA_2, _SCHEMA_3)
SCHEMA_VERSION = len(_MIGRATIONS)


@contextlib.contextmanager
def missing_is_none():
    """Go on where a table or column is missing."""
    try:
        yield
    except sqlite3.OperationalError as exc:
        if "no such" not in str(exc):
            raise


class Tables:
    """Our tables in a file.  `ask` runs one statement and returns its first value."""

    def __init__(self, path: str, ask: Callable[[str], Any]):
        self._path, self._ask = path, ask

    def open(self, create: bool) -> tuple | None:
        """Bring them up to date, if there are any, or if they may be made.

        Returns what that took of those that there were: (from, to, seconds).
        """
        version = self.version()
        if not version and not create:
            raise DatabaseUnusable(
                f"database {self._path}: there is no queue in it: name another with "
                "--db or PYBGWORKER_DB; the first delay() or run makes one"
            )
        self._use_wal()
        if version == SCHEMA_VERSION:
            return None
        began = time.monotonic()
        self._ask("begin immediate")
        try:
            self.migrate()
            self._ask("commit")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):    # it may be undone already
                self._ask("rollback")
            raise
        seconds = time.monotonic() - began
        return (version, len(_MIGRATIONS), seconds) if version else None

    def version(self) -> int:
        """Of our tables; 0: there are none."""
        if not self._ask("""select count(*) from sqlite_master
                             where name in ('bg_meta', 'bg_task')"""):
            return 0
        version = None
        with missing_is_none():
            version = self._ask(
                """select value + 0 from bg_meta where name = 'schema'""")
        if version is None:
            raise sqlite3.OperationalError("table bg_task already exists")
        if version > SCHEMA_VERSION:
            raise DatabaseUnusable(
                f"database {self._path}: made by a newer pybgworker (schema {version}, "
                f"this one knows {SCHEMA_VERSION}): update this file"
            )
        return version

    def migrate(self) -> None:
        """Under the write lock: another may have done it meanwhile."""
        for statements in _MIGRATIONS[self.version():]:
            for statement in statements:
                self._ask(statement)
            self._ask("""update bg_meta set value = value + 1 where name = 'schema'""")

    def _use_wal(self):
        """Needs the file alone for a moment; SQLite does not wait for that."""
        while self._ask("pragma journal_mode") != "wal":
            mode = self._ask("pragma journal_mode = wal")
            if mode != "wal":
                raise sqlite3.OperationalError(f"journal mode is {mode}, not wal")


# == Database =================================================================
# Owns connections, transactions and the write-ahead log.  Knows nothing of what the
# rows mean.
#
# Rules that hold here and in the sections that follow, each with its reason:
#   begin immediate     a read that upgrades fails at once instead of waiting
#   no RETURNING        unordered, and its cursor holds the write lock open
#   literals in where   a partial index does not match a bound parameter
#   no open()           closing any descriptor of the file drops SQLite's locks

REENTERED = (
    "database {}: this thread is in the middle of a transaction: a signal handler may "
    "have interrupted it; let the handler set a flag instead"
)
_WAKE_WORKERS = 32                  # how many are sent a hint
_CHECKPOINT_BYTES = 2 << 20         # of -wal, when a worker moves it over
# … and when a caller does, if nobody else has.  A commit that overwrites the -wal is
# faster by a third than one that lengthens it, for that changes the file's size, too.
CALLER_CHECKPOINT_BYTES = 4 << 20
_WAL_KEEP_BYTES = 64 << 20          # a longer -wal is cut when it starts anew
_WALL_SHARE = 5                     # seconds by the clock that stand for one of CPU
_STEPS_BETWEEN_LOOKS = 20_000       # of SQLite, at a clock: about a millisecond's worth


def patiently(connection, deadline, statement):
    """Run one statement until it is not locked out; return its first value."""
    while True:
        try:
            rows = connection.execute(statement).fetchall()
            return rows[0][0] if rows else None
        except sqlite3.OperationalError as exc:
            if not is_busy(exc) or time.monotonic() > deadline:
                raise
            if FORKS.is_on():
                raise StepAside from exc
        # Short and uneven: SQLite's own waiting grows, so newcomers would win.
        time.sleep(random.uniform(0.0005, 0.003))


def _set_up(connection, deadline):
    for pragma in (
        "wal_autocheckpoint = 0",       # see checkpoint()
        f"journal_size_limit = {_WAL_KEEP_BYTES}",
        "secure_delete = off",          # on by default in some builds
        "temp_store = memory",
        "cache_size = -8000",           # KiB
        "fullfsync = on",               # macOS: reach the platter
    ):
        patiently(connection, deadline, "pragma " + pragma)


class Transaction:
    """A write transaction of this thread.  They do not nest."""

    def __init__(self, db: Database, durable: bool, deadline: float):
        self._db, self._deadline = db, deadline
        self._synchronous = \
            "full" if durable and db.durability == "full" else "normal"
        self.link: Any = None       # the Link it is on, from __enter__() on

    def __enter__(self) -> Link:
        """Take the write lock; return the link that has it."""
        while True:
            link = self._db.free_link()
            try:
                link.writer = weakref.ref(self)     # from here on a fork waits for us
                if not FORKS.is_on():
                    self._take_lock(link)
                    self.link = link
                    return link
            except StepAside:
                pass
            except BaseException:
                link.writer = nobody
                raise
            link.writer = nobody
            FORKS.wait()

    def _take_lock(self, link):
        link.undone = True
        try:
            if link.connection.in_transaction:  # an interrupt (Ctrl-C) has left it open
                link.roll_back()
            if link.synchronous != self._synchronous:
                link.connection.execute("pragma synchronous = " + self._synchronous)
                link.synchronous = self._synchronous
            patiently(link.connection, self._deadline, "begin immediate")
            link.undone = False
        except sqlite3.Error as exc:
            link.is_stale = "readonly" in str(exc)
            raise explained(exc, self._db.path) from exc

    @property
    def is_committed(self) -> bool:
        """True once it is; also where an interrupt hides how the block ended."""
        link = self.link
        return link is not None and not (link.undone or link.is_open)

    def __exit__(self, kind, exc, trace):
        link, is_undone = self.link, kind is not None
        wake, link.wake = link.wake, []
        try:
            if not is_undone:
                self._commit(link)
        except (sqlite3.Error, DatabaseUnavailable) as failed:
            is_undone, exc = True, failed
        finally:
            if is_undone:
                link.roll_back()
            link.writer = nobody
        if not is_undone:
            link.commits += 1
            send_wake_ups(wake)
        elif isinstance(exc, sqlite3.Error):
            link.is_stale = "readonly" in str(exc)
            raise explained(exc, self._db.path) from exc
        elif kind is None:
            raise exc
        return False

    def _commit(self, link):
        """Return once it is committed, to the log that all others read."""
        if link.generation != FORKS.generation():
            raise Undone(FORKED.format(self._db.path))
        link.connection.execute("commit")
        if link.is_closed:      # by a fork since then, which has put the -wal away
            FILES.check(link.identity, self._db.path)
        elif not link.wal.is_there() and not FILES.is_away(link.identity):
            # Nobody will ever see what is in ours.  Where Guards cannot prevent it,
            # a stray close() of the file in this process has dropped our locks, and
            # another program took itself for the last user; else it was done by hand.
            FILES.refused[link.identity] = WAL_LOST
            FORKS.check(link.identity, self._db.path)


class Database:
    """The file `path`.  One connection for each thread that asks.

    What is without a word here is a verb of Store, and promises what is said there.
    """

    def __init__(self, path: str, durability: str = "full",
                 busy_timeout: float = 30.0, allow_network_fs: bool = False):
        self.name = absolute(path)                 # as it was given
        self.path = os.path.realpath(self.name)     # its one name for all
        self.durability = durability
        self.busy_timeout = busy_timeout
        self.allow_network_fs = allow_network_fs
        self.follow = True          # to the new file, when ours is replaced
        self.may_create = True      # until it is opened
        self.migrated: tuple | None = None      # what bringing it up to date took
        self._tried_bytes = 0       # of the log, when a caller last moved it over
        self._local = threading.local()

    def create(self) -> tuple | None:
        if not self.may_create:
            self.link()
            return self.migrated
        if self.path not in KNOWN_PATHS:
            make_file(self.path)
        self._local.link = self._open(create=not KNOWN_PATHS.get(self.path))
        return self.migrated

    def write(self, durable: bool = True, patience: float | None = None,
              deadline: float | None = None) -> Transaction:
        """A transaction that begins by taking the write lock.

        `durable=False` spares the fsync, for what is harmless to lose in a power
        cut.  Waits at most `patience` seconds (default: busy_timeout), or until
        time.monotonic() is past `deadline`, then raises DatabaseBusy.  Raises
        DatabaseUnavailable for all else.
        """
        if deadline is None:
            deadline = time.monotonic() + (
                self.busy_timeout if patience is None else patience)
        return Transaction(self, durable, deadline)

    def link(self) -> Link:
        """This thread's link; in a transaction, the one that it is on."""
        link = getattr(self._local, "link", None)
        if link is not None and link.writer() is not None:
            return link         # of the block we are in; if closed, it has failed
        return self._current(link)

    def free_link(self) -> Link:
        """This thread's link, which is in no transaction."""
        link = getattr(self._local, "link", None)
        if link is not None and link.writer() is not None:
            if link.is_open:
                raise DatabaseBusy(REENTERED.format(self.path))
            link.writer = nobody
        return self._current(link)

    def _current(self, link):
        """It, or a new one in its place where it is of no use any more."""
        if link is None or link.generation != FORKS.generation():
            link = self._local.link = self._open()
        elif (
            link.is_closed or link.is_stale
            or link.identity != file_identity(self.name)
        ) and not link.is_open:
            link = self._reopen(link)
        return link

    def _reopen(self, link):
        """The file was replaced: a write to the old one would vanish with it.

        One that is away may come back as it was: a disk, a folder that was renamed.
        """
        path = os.path.realpath(self.name)          # a link may lead elsewhere now
        found = file_identity(path)
        if found is None:
            raise DatabaseUnavailable(GONE.format(self.path))
        if not self.follow and found != link.identity:
            raise DatabaseUnusable(
                f"database {self.path}: the file was replaced while in use: start the "
                "worker again"
            )
        self.path = path
        if found != link.identity and link.wal.lies_before(self.path):
            raise DatabaseUnusable(
                f"database {self.path}: the file was replaced, and the -wal of the old "
                "one lies before it, which may destroy it: stop all programs that use "
                "it, put the file in place again, delete its -wal and -shm"
            )
        link.close()
        self._local.link = link = self._open()
        return link

    def close(self) -> None:
        link, self._local.link = getattr(self._local, "link", None), None
        if link and link.generation == FORKS.generation():
            link.close()
        FILES.let_go()

    def _open(self, create=False):
        while True:
            check_exists(self.path)
            check_place(self.path, mount_table(), self.allow_network_fs)
            try:
                with FORKS.using():
                    return self._open_now(create)
            except StepAside:
                continue
            except sqlite3.Error as exc:
                raise explained(exc, self.path) from exc

    def _open_now(self, create):
        identity = file_identity(self.path)
        FORKS.check(identity, self.path)
        has_others = FILES.has_others(identity)
        link = Link(
            connect_to(self.path, check_same_thread=False, cached_statements=256),
            identity,
        )
        try:
            deadline = time.monotonic() + self.busy_timeout
            _set_up(link.connection, deadline)
            ask = functools.partial(patiently, link.connection, deadline)
            self.migrated = Tables(self.path, ask).open(create) or self.migrated
            if not FORKS.is_leaving:    # else nobody will close it in good order
                link.guard = FILES.hold(identity, self.path, has_others)
        except BaseException:
            link.close()
            raise
        link.wal = WalFiles(self.path)
        self.may_create = False
        KNOWN_PATHS[self.path] = True
        return link

    def prepare(self, cursor: sqlite3.Cursor) -> None:
        """Make the tables, if need be, in somebody else's transaction on this file."""
        def ask(statement):
            row = cursor.execute(statement).fetchone()
            return row and row[0]

        Tables(self.path, ask).migrate()

    def read(self, statement, parameters=()):
        """Run a query to its end: an open cursor would hold the -wal in place."""
        deadline = time.monotonic() + self.busy_timeout
        while True:
            link = self.link()
            outer, inside = link.is_reading, link.writer() is not None
            try:
                link.is_reading = True      # from here on a fork waits for us
                if outer or inside or not FORKS.is_on():    # it waits for outer ones
                    return link.connection.execute(statement, parameters).fetchall()
            except sqlite3.Error as exc:
                is_forked = link.is_closed and not inside
                if not is_forked and (not is_busy(exc) or time.monotonic() > deadline):
                    raise explained(exc, self.path) from exc
            finally:
                link.is_reading = outer
            FORKS.wait()
            time.sleep(random.uniform(0.0005, 0.003))

    @contextlib.contextmanager
    def glance(self, seconds: float) -> Iterator[None]:
        cpu, wall = time.thread_time(), time.monotonic()
        connection = self.link().connection
        connection.execute("pragma query_only = on").fetchall()
        connection.set_progress_handler(
            lambda: time.thread_time() - cpu > seconds
            or time.monotonic() - wall > _WALL_SHARE * seconds, _STEPS_BETWEEN_LOOKS)
        try:
            yield
        finally:
            with contextlib.suppress(sqlite3.Error):    # a fork may have closed it
                connection.set_progress_handler(None, 0)
                connection.execute("pragma query_only = off").fetchall()

    def data_version(self) -> tuple:
        number = self.read("pragma data_version")[0][0]
        return weakref.ref(self._local.link), number

    def version(self) -> tuple:
        return *self.data_version(), self._local.link.commits

    def wal_bytes(self) -> int:
        """The size of the write-ahead log."""
        try:
            return os.stat(self.path + "-wal").st_size
        except OSError:
            return 0

    def checkpoint(self) -> None:
        """Move the write-ahead log into the database, so that it can start anew.

        SQLite before 3.51.3 can corrupt a file when one connection resets the log
        while another checkpoints it.  Nobody can reset it here: the write lock is
        held meanwhile, by a second connection.
        https://sqlite.org/wal.html#walresetbug
        """
        with self.write(durable=False, patience=0.05), \
                contextlib.closing(connect_to(self.path)) as helper:
            helper.execute("pragma wal_autocheckpoint = 0").fetchall()
            helper.execute("pragma wal_checkpoint(passive)").fetchall()

    def checkpoint_if_large(self, limit: int = _CHECKPOINT_BYTES) -> None:
        if self._log_bytes(self.link()) > limit:
            with contextlib.suppress(DatabaseBusy):
                self.checkpoint()

    def checkpoint_by_caller(self, link: Link) -> None:
        """The same where no worker does it; not for each commit while none helps.

        Whoever wrote what is in the log: a thread, or a process, for every call.
        Never raises DatabaseUnavailable: what the caller wanted is committed.
        """
        found, last = self._log_bytes(link), self._tried_bytes
        if found <= CALLER_CHECKPOINT_BYTES:
            self._tried_bytes = 0
        elif not last <= found < last + CALLER_CHECKPOINT_BYTES // 4:
            self._tried_bytes = found
            with contextlib.suppress(DatabaseUnavailable):
                self.checkpoint_if_large(CALLER_CHECKPOINT_BYTES)

    def _log_bytes(self, link):
        """What lies in the log alone; its size, which may be more, where unknown."""
        found = link.guard and link.guard.log_bytes()
        return self.wal_bytes() if found is None else found


@contextlib.contextmanager
def one_moment(db: Database) -> Iterator[None]:
    """A block in which all that read() finds is of one moment; nothing is written.

    Text that is no UTF-8, as only an edit by hand leaves it, is read all the same.
    """
    while True:
        link = db.link()
        outer, link.is_reading = link.is_reading, True      # a fork waits for us
        if outer or link.writer() is not None or not FORKS.is_on():
            break
        link.is_reading = outer
        FORKS.wait()
    lenient = functools.partial(str, encoding="utf-8", errors="replace")
    before, link.connection.text_factory = link.connection.text_factory, lenient
    begins = not link.is_open
    try:
        if begins:
            db.read("begin")
        yield
    finally:
        with contextlib.suppress(sqlite3.Error):    # a fork may have closed it
            link.connection.text_factory = before
            if begins:
                link.connection.execute("rollback")
        link.is_reading = outer


def wake_addresses(connection: sqlite3.Connection) -> list[tuple]:
    """Of the workers that beat last: those of the dead may lie there by thousands.

    A worker that gets no hint looks by itself, a little later.
    """
    return connection.execute(
        """select port, token from bg_worker where port > 0
            order by beat_at desc limit :most""",
        {"most": _WAKE_WORKERS},
    ).fetchall()


# == Group commit =============================================================
# Owns how threads that enqueue at the same time share one commit, and so one fsync.
# Knows of the store only how to insert; what is in a request is not looked at.

_TRIES = 5                  # of a commit, when forks undo it
_BELL_SECONDS = 0.1         # until a thread that nobody calls looks by itself
_CROWD_SECONDS = 0.0001     # for threads just served to come back with more


class Request:
    """Calls of a task that one thread wants enqueued, and then their ids."""

    __slots__ = ("task", "calls", "ids", "is_done", "error", "bell", "deadline",
                 "is_given_up", "is_taken")

    def __init__(self, task: NewTask, calls: Sequence[str],
                 deadline: float = math.inf):
        self.task = task
        self.calls = calls          # a text of encoded arguments for each
        self.ids: list = []
        self.is_done = False        # committed
        self.error: DatabaseBusy | None = None
        self.is_given_up = False    # its thread was interrupted: not to be inserted
        self.is_taken = False       # in the transaction that is open now
        self.deadline = deadline    # monotonic: its thread waits no longer for a lock
        self.bell = threading.Lock()        # opens when it is settled, or is to lead
        self.bell.acquire()

    @property
    def is_settled(self) -> bool:
        """True when nothing is left to be done about it."""
        return self.is_done or self.error is not None

    def take(self) -> bool:
        """True if it is to be inserted now: then its thread cannot give up any more."""
        self.is_taken = True        # before the look; GroupCommit._drop(): reverse
        if self.is_given_up:
            self.is_taken = False
        return self.is_taken

    def call(self) -> None:
        """Wake its thread."""
        with contextlib.suppress(RuntimeError):     # somebody has, before
            self.bell.release()


class GroupCommit:
    """Threads that enqueue at the same time share one commit, and so one fsync.

    Each puts its request down.  One of them leads: it commits all requests that lie
    there, while the others wait to be called, and then the next is called to lead.
    """

    def __init__(self, insert: Callable[[list[Request], float], None], path: str):
        self.generation = FORKS.count      # inherited locks may never open
        self._insert = insert       # until a deadline; marks each as done
        self._path = path
        self._leading = threading.Lock()
        self._requests: collections.deque = collections.deque()
        self._crowd = 0             # requests that the last leader found
        self._leader = 0            # ident of the thread that leads

    def submit(self, request: Request) -> list:
        """Return the ids once they are committed; or raise, with nothing written.

        Ctrl-C that arrives while they are committed is raised after that.
        """
        if self._leader == threading.get_ident():       # in a signal handler
            raise DatabaseBusy(REENTERED.format(self._path))
        self._requests.append(request)
        try:
            while not request.is_settled:
                self._wait_or_lead(request)
        except BaseException:       # also Ctrl-C: nobody shall commit it later
            self._drop(request)
            raise
        finally:
            self._call_next()
        if request.error:
            raise request.error
        return request.ids

    def _drop(self, request):
        """Nobody inserts it from now on; or it is committed, or undone, already.

        Waits for a transaction that it is in, not for one that waits for its turn.
        """
        request.is_given_up = True
        with contextlib.suppress(ValueError):
            self._requests.remove(request)
        while request.is_taken and not request.is_settled and \
                self._leading.locked() and self.generation == FORKS.generation():
            request.bell.acquire(timeout=_BELL_SECONDS)

    def _wait_or_lead(self, request):
        if self._leading.locked():
            request.bell.acquire(timeout=_BELL_SECONDS)
            self._check_process()
            return
        with self._leading:
            self._leader = threading.get_ident()
            try:
                if not request.is_settled:
                    self._lead(request)
            finally:
                self._leader = 0

    def _call_next(self):
        if self._requests and not self._leading.locked():
            with contextlib.suppress(IndexError):       # another was faster
                self._requests[0].call()

    def _lead(self, own):
        if self._crowd > 1:
            time.sleep(_CROWD_SECONDS)
        requests = [own]
        try:
            while self._requests:
                request = self._requests.popleft()
                if request is not own:
                    requests.append(request)
        except IndexError:          # one that gives up takes its own
            pass
        self._crowd = len(requests)
        try:
            self._commit(requests)
        except DatabaseBusy as exc:
            if not self._give_up(requests, exc):
                raise                   # this thread's trouble: it is in a transaction
        except (DatabaseUnavailable, ValueError, OverflowError):
            if len(requests) == 1:
                raise
            self._commit([own])     # who is to blame?  Each leads for itself, then
        finally:
            for request in requests[1:]:
                request.call()

    def _give_up(self, requests, exc):
        """Fail those that have waited long enough; the rest lead for themselves.

        Guarded by test_nobody_waits_longer_for_a_lock_than_since_it_came.
        """
        now = time.monotonic()
        late = [request for request in requests if request.deadline <= now]
        for request in late:
            request.error = DatabaseBusy(str(exc))
        self._requests.extendleft(
            r for r in reversed(requests) if not (r in late or r.is_given_up))
        return late

    def _check_process(self):
        """The requests of a parent, inherited in the middle, are not ours."""
        if self.generation != FORKS.generation():
            raise DatabaseUnavailable(FORKED.format(self._path))

    def _commit(self, requests):
        deadline = min([request.deadline for request in requests])
        for left in reversed(range(_TRIES)):
            try:
                return self._insert(requests, deadline)
            except Undone:
                self._check_process()
                if not left:
                    raise


# == Queue ====================================================================
# Owns the SQL of how tasks come in.  Here and in the sections up to Register, what a
# verb promises is said in Store.  One that writes is a transaction of its own, which
# ends with it; what serves several has the connection, or the link, as its first
# argument.  Rows leave as small objects: only Book Two knows a column.

# Kinds in bg_payload.
ARGS, RESULT, ERROR, OUTPUT, PROGRESS, MARK, ATTEMPTS, OUTPUTS = range(8)
INLINE_CHARS = 1000         # longer texts go to bg_payload, off the hot row
_NOT_ITS_FILES = (
    "database {}: conn= does not write to it: the file, its -wal or its -shm was "
    "deleted, replaced or closed by hand while conn= was open: roll back, close it, "
    "and open it again"
)


def insert_all(link, requests):
    """Insert what is requested; wake workers once it is committed."""
    first, place, is_awaited = _next_id(link.connection)
    link.wake = wake_addresses(link.connection) if is_awaited else []
    _insert(link.connection, requests, first, place)


_INSERT = """
    insert into bg_task (id, place, name, queue, priority, key, retries, timeout,
        state, run_at, created_at, tick, counted, args)
    values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""


def _insert(connection, requests, first, place):
    for request in requests:
        task, calls = request.task, request.calls
        holder = task.key and key_holder(connection, task.key)
        if holder:
            request.ids = [holder] * len(calls)
            continue
        request.ids = list(range(first, first + len(calls)))
        connection.executemany(_INSERT, [
            (number, place, *task, text if len(text) <= INLINE_CHARS else None)
            for number, text in zip(request.ids, calls)
        ])
        for number, text in zip(request.ids, calls):
            if len(text) > INLINE_CHARS:
                put_payload(connection, number, ARGS, text)
        first += len(calls)


def key_holder(connection, key):
    """Id of the unfinished task with this key.  The write lock is held."""
    if key is None:
        return None
    row = connection.execute(
        f"""select id + 0 from bg_task
            where key = :key and key is not null and state < {SUCCESS}""",
        {"key": key},
    ).fetchone()
    return row and row[0]


def _next_id(connection):
    """One above every id ever given; the place of what is new; 1 if a worker listens.

    Also above ids of deleted rows; and behind every retry that queued again, which
    takes a place of its own behind all that were new before: see queue_behind().
    Both are expressions: a converter of the caller's does not get at them.
    """
    return connection.execute(
        """select 1 + max(last.value, ifnull((select max(id) from bg_task), 0)),
                place.value + 0, exists (select 1 from bg_worker where port > 0)
            from bg_meta last, bg_meta place
            where last.name = 'last_id' and place.name = 'place'"""
    ).fetchone()


def put_payload(connection, task_id, kind, body):
    """Keep a text of a task, in place of the last one of this kind."""
    connection.execute(
        """insert or replace into bg_payload (id, body) values (:id, :body)""",
        {"id": task_id * 8 + kind, "body": body},
    )


def payload_of(db, task_id, kind):
    """Return a text that was kept of a task, or None."""
    rows = db.read(
        """select body from bg_payload where id = :id""",
        {"id": task_id * 8 + kind},
    )
    return rows[0][0] if rows else None


class CallersTransaction:
    """A transaction on the caller's own connection (`conn=`), for delay() to share.

    It stays open, unless the connection is one that commits by itself.  An error
    takes back all that was written inside the block, and nothing else.
    """

    def __init__(self, db: Database, connection: sqlite3.Connection):
        if not isinstance(connection, sqlite3.Connection):
            raise OptionError(
                f"conn= must be an sqlite3.Connection, not {type(connection)}: see "
                "the attribute driver_connection in SQLAlchemy, connection in Django"
            )
        self.db, self.connection = db, connection
        self._cursor: Any = None    # of ours: no factory of the caller's
        self._began = False         # here

    def __enter__(self) -> sqlite3.Cursor:
        try:
            self._check_file()
            cursor = self._cursor = sqlite3.Cursor(self.connection)     # a plain one
            self._began = not self.connection.in_transaction
            # Writes before it reads.  Then SQLite waits for its turn, and a
            # transaction that has read before another's commit never gets one.
            if self._began:
                cursor.execute("begin immediate")
            else:
                with missing_is_none():
                    cursor.execute(
                        """update bg_meta set value = value where name = 'last_id'"""
                    )
            cursor.execute("savepoint bg_enqueue")
            self.db.prepare(cursor)
            return cursor
        except BaseException as exc:
            self._undo()
            self._refuse(exc)
            raise

    def __exit__(self, kind, exc, trace):
        if exc is None:
            try:
                self._cursor.execute("release bg_enqueue")
                if self._began and self._commits_by_itself():
                    self._cursor.execute("commit")
                return False
            except sqlite3.Error as failed:
                exc = failed
        self._undo()
        self._refuse(exc)
        return False

    def _commits_by_itself(self):
        mode = getattr(self.connection, "autocommit", None)     # from 3.12 on
        return mode is True or (
            mode is not False and self.connection.isolation_level is None)

    def _undo(self):
        if self._cursor is None:
            return
        with contextlib.suppress(sqlite3.Error):    # it may be undone already
            if self._began:
                self._cursor.execute("rollback")
            else:
                self._cursor.execute("rollback to bg_enqueue")
                self._cursor.execute("release bg_enqueue")

    def _check_file(self):
        """Refuse a connection to another file: the task would never be found."""
        # Reads nothing from the file, unlike a select.
        path = os.fsdecode(self._ask("pragma database_list")[2] or b"")
        ours, found = self.db.path, file_identity(path)
        if found is None or found != file_identity(ours) or (
            os.path.realpath(path) != ours and count_names(path) > 1
        ):
            raise OptionError(
                f"conn= is open on {path or 'memory'}, the queue is {ours}")
        KNOWN_PATHS.setdefault(ours, False)

    def keep_files(self) -> None:
        """Hold the files in place for it, which must be those that it writes to.

        To be called when it has written.  What is deleted, or was replaced, while it
        is open takes the lock on writing with it.
        """
        path = self.db.path
        identity = file_identity(path)
        if FILES.is_held_for_caller(identity) or \
                self._ask("pragma main.journal_mode")[0] != b"wal":     # not yet
            return
        guard = FILES.hold_for_caller(identity, path)
        if guard and not guard.is_where_we_write():
            raise DatabaseUnavailable(_NOT_ITS_FILES.format(path))

    def _ask(self, statement):
        """The first row; its texts are bytes, whatever the caller's factory is."""
        factory, self.connection.text_factory = self.connection.text_factory, bytes
        try:
            return sqlite3.Cursor(self.connection).execute(statement).fetchone()
        finally:
            self.connection.text_factory = factory

    def _refuse(self, exc):
        """Raise what says what to do about an error of the caller's connection."""
        if isinstance(exc, sqlite3.ProgrammingError):   # closed, or another thread's
            raise OptionError(f"conn=: {exc}") from exc
        if isinstance(exc, sqlite3.Error):
            if "readonly" in str(exc):
                raise DatabaseUnavailable("conn= was opened read-only") from exc
            if is_busy(exc):
                raise DatabaseBusy(
                    f"conn=: {exc}: another connection is writing; a transaction that "
                    "reads before it enqueues must start with 'begin immediate'"
                ) from exc
            raise explained(exc, self.db.path) from exc


class Queue:
    """The verbs of callers that enqueue."""

    db: Database

    _group: GroupCommit | None = None

    def enqueue(self, task: NewTask, calls: Sequence[str]) -> list:
        request = Request(task, calls, time.monotonic() + self.db.busy_timeout)
        if self.db.may_create:
            self.db.create()
        group = self._group
        if group is None or group.generation != FORKS.generation():
            group = self._group = GroupCommit(self._enqueue_all, self.db.path)
        return group.submit(request)

    def _enqueue_all(self, requests, deadline):
        """The same for each, in one commit; they are told when it is done.

        Raises DatabaseBusy when time.monotonic() has passed `deadline`.
        """
        write, taken = self.db.write(deadline=deadline), []
        try:
            with write as link:
                taken = [request for request in requests if request.take()]
                insert_all(link, taken)
        finally:
            for request in taken:
                request.is_done = write.is_committed
                request.is_taken = False
        self.db.checkpoint_by_caller(write.link)

    def enqueue_with(self, connection: sqlite3.Connection, task: NewTask,
                     calls: Sequence[str]) -> tuple[list, str | None]:
        request = Request(task, calls)
        FORKS.check(file_identity(self.db.path), self.db.path)
        transaction = CallersTransaction(self.db, connection)
        with FORKS.using(), transaction as cursor:
            holder = key_holder(cursor, task.key)
            _insert(cursor, [request], *_next_id(cursor)[:2])
            transaction.keep_files()
            if holder is not None:      # as bytes: text is for the caller's factory
                mark = cursor.execute(
                    """select cast(body as blob) from bg_payload where id = :id""",
                    {"id": holder * 8 + MARK},
                ).fetchone()
                return request.ids, mark and mark[0].decode()
            mark = os.urandom(8).hex()
            for task_id in request.ids:
                put_payload(cursor, task_id, MARK, mark)
        return request.ids, mark

    def has_mark(self, task_id: int, mark: str) -> bool:
        return payload_of(self.db, task_id, MARK) == mark


# == Picking ==================================================================
# Owns the choice among the rows that a look for work comes by: whether a worker wants
# one, and has a place for it.  What needs a place of one kind is no hindrance to what
# needs another.  Reads and writes nothing.

# Where in a row that is offered; what stands before the place is that of a Run.
ROW_ID, ROW_NAME, ROW_QUEUE, ROW_PRIORITY, ROW_PLACE, ROW_PAUSED = \
    0, 1, 2, 10, 11, 12


def order_of(row):
    """Where a row stands in the order of claims."""
    return row[ROW_PRIORITY], row[ROW_PLACE], row[ROW_ID]


class Lane:
    """The places of one kind, as they fill up."""

    def __init__(self, free: int, ahead: int = 0, is_beside: bool = False):
        self.free, self.ahead = free, ahead
        self.is_beside = is_beside      # they are for coroutines
        self.is_full = not (free or ahead)      # nothing behind can be taken, either
        self.has_taken = False
        self.needs_child: int | None = None     # priority of what does


class Pick:
    """Is offered rows in order, and keeps those that the worker can take."""

    def __init__(self, order: ClaimOrder, limits: Limits | None, now: int):
        self.order, self.limits = order, limits
        self.lanes = [Lane(order.free, order.ahead)]
        if order.beside_names:
            self.lanes.append(Lane(order.beside, is_beside=True))
        self._alone = order.alone
        self.runs: list[Run] = []
        self.ranges: list[list] = []    # [(callbacks, priority, place), first id, last]
        self.loners: list[Run] = []     # of the runs, those not in the ranges
        self.limited: dict[str, float] = {}
        self._range: list = []          # the last one; empty: a row was passed over
        self.is_full = all(lane.is_full for lane in self.lanes)
        if limits and order.round.limited:
            self._remember(limits, now)

    def _remember(self, limits, now):
        """Take over from the round which names wait; those that may start, do not."""
        known, shut = self.order.round.limited, limits.opens_at("")
        if shut is not None:
            self.close()
            known = {name: max(until, shut) for name, until in known.items()}
        self.limited = {name: until for name, until in known.items() if until > now}

    def close(self) -> None:
        """Take nothing more, of any kind."""
        for lane in self.lanes:
            lane.is_full = True
        self.is_full = True

    @property
    def room(self) -> int:
        """Places that are left."""
        return sum([lane.free + lane.ahead for lane in self.lanes])

    def offer(self, row: tuple, follows: bool = True) -> bool:
        """Take the run if it can be taken.  False: nor can others of its group.

        `follows`: nothing lies between this row and the one offered before.
        """
        if not follows:
            self._range = []
        order, name = self.order, row[ROW_NAME]
        lane = self.lanes[name in order.beside_names]
        # As _is_wanted() says; but this is done for each run that there is.
        if lane.is_full or row[ROW_PAUSED] or name not in order.names \
                or order.queues is not None and row[ROW_QUEUE] not in order.queues \
                or self.limits and self.waits(name):
            self._range = []
            return False
        run, is_ahead = Run(*row[:ROW_PLACE]), not lane.free
        if is_ahead and not (
            lane.ahead and name in order.ahead_names
            and (not run.is_last or order.proves_begun)
            and (not self.limits or self.limits.may_wait(name))
        ):
            lane.needs_child = run.priority     # and none may pass it
            self._fill(lane)
            self._range = []
            return False
        self._take(run, lane, is_ahead)
        last, task_id = self._range, row[ROW_ID]
        key = run.callbacks, row[ROW_PRIORITY], row[ROW_PLACE]
        if last and last[0] == key:     # of rows that follow each other, only the ends
            last[2] = task_id
        else:
            self._range = [key, task_id, task_id]
            self.ranges.append(self._range)
        return True

    def offer_alone(self, row: tuple) -> bool:
        """The same for a run that is to have a child to itself."""
        lane = self.lanes[row[ROW_NAME] in self.order.beside_names]
        if not (self._alone and lane.free) or lane.is_full or not self._is_wanted(row):
            return False
        run = Run(*row[:ROW_PLACE])
        run.alone = True
        for other in self.lanes:        # it may be the child with their last place
            if other is not lane and other.free:
                other.free -= 1
                if not (other.free or other.ahead):
                    self._fill(other)
        self._take(run, lane)
        self.loners.append(run)
        return True

    def _is_wanted(self, row):
        order, name = self.order, row[ROW_NAME]
        return not (row[ROW_PAUSED] or name not in order.names
                    or order.queues is not None and row[ROW_QUEUE] not in order.queues
                    or self.limits and self.waits(name))

    def _take(self, run, lane, is_ahead=False):
        if is_ahead:
            lane.ahead -= 1
        else:
            lane.free -= 1
            if self._alone:
                self._alone -= 1        # perhaps its child had nothing to do
        name, order = run.name, self.order
        if self.limits:
            run.tokens = self.limits.spend(name, is_ahead)
            run.is_counted = name in order.most_running
        run.callbacks = order.callbacks.get(name, 0)
        self.runs.append(run)
        lane.has_taken = True
        if not (lane.free or lane.ahead):
            self._fill(lane)

    def _fill(self, lane):
        lane.is_full = True
        self.is_full = all(other.is_full for other in self.lanes)

    def waits(self, name: str) -> bool:
        """True when the name is at a limit, and so are all when all are."""
        if not self.limits:
            return False
        if name in self.limited:
            return True
        until = self.limits.opens_at(name)
        if until is not None:
            self.limited[name] = until
            if self.limits.opens_at("") is not None:
                self.close()
        return until is not None


# == Claiming =================================================================
# Owns what a look for work reads, and the mark that makes a run a worker's own.
# The order is by priority, then by place, then by id.  A look reads what it takes
# and a fixed number of rows and seeks, however much lies there that this worker
# cannot take: what is paused, unknown, not served, or over its rate.  What one
# look does not reach, the next ones do: see Round.  Knows nothing of outcomes.

PROMOTE_BATCH = 500        # scheduled tasks made ready by one turn
_PASS_ROWS = 32             # rows that a look passes over, in the order of claims
_SEEK_STEPS = 128           # … and then goes so far from group to group
_PASS_ALONE = 100           # … of those that need a child to themselves: there are few
_LEAPS = 8                  # paused queues that one of these steps leaps over
_ANY_ROW = f"""
    select id, name, queue, attempt, retries, forgiven, timeout, run_at, tick, args,
        priority, place,
        exists (select 1 from bg_queue where bg_queue.name = bg_task.queue)
    from bg_task where state = {QUEUED}"""
_TASK_ROW, _ALONE_ROW = _ANY_ROW + " and alone = 0", _ANY_ROW + " and alone <> 0"


class Look:
    """One look for work: reads by a connection, and writes nothing.

    What it found is in `pick`; `round` is how far it came.  `has_alone`: there are
    runs that need a child to themselves.
    """

    def __init__(self, connection: sqlite3.Connection, order: ClaimOrder, now: int,
                 has_alone: int = 0):
        self._connection, self.order = connection, order
        self.limits = None
        if order.rates or order.most_running:
            self.limits = Limits(order.rates, order.most_running, self._tat,
                                 self._running, now)
        self.pick = Pick(order, self.limits, now)
        self.round = self._run(has_alone and order.alone)

    def seen(self, due: int | None) -> Claimed:
        """What it found; something else is due at `due`."""
        return Claimed(self.pick.runs, earliest(due, self.round.opens_at()), self.round,
                       waits=self.pick.lanes[0].needs_child)

    def _run(self, has_alone):
        """Offer rows to the pick; return where the round stands then."""
        pick, order, is_in_order = self.pick, self.order, False
        if not pick.is_full and (order.queues is None or has_alone):
            is_in_order = True
            if self._offer_in_order(has_alone):
                return Round(None, pick.limited)
        if pick.is_full and len(pick.lanes) == 1:       # as mostly
            return self._stand(pick.lanes[0], order.round, (), None)
        begun = order.round
        if len(pick.limited) < len(begun.limited):  # the look may be past what opened
            begun = begun.renewed()
        rounds = begun, begun.beside or Round()
        # A round that is over waits for the other: else they take turns for ever.
        # Guarded by test_rounds_of_two_kinds_come_to_an_end_together.
        goes_on = {r.after is not None and not r.again for r in rounds} == {True, False}
        looks = [
            (lane, r, [], None) if goes_on and r.after is None
            else (lane, r, *self._groups(lane, r))
            for lane, r in zip(pick.lanes, rounds)
        ]
        if not is_in_order and any(round_.after or after
                                   for lane, round_, _, after in looks
                                   if not lane.is_full):
            self._offer_in_order()      # too many to see the first among them
        self._offer_groups([head for *_, heads, _ in looks for head in heads])
        main, *beside = [self._stand(*look) for look in looks]
        return main.with_beside(*beside) if beside else main

    def _stand(self, lane, round_, heads, after):
        """The round of one kind, when its groups up to `after` were seen."""
        limited = self.pick.limited
        if lane.is_full and not (lane.has_taken and heads):
            return Round(round_.after, limited, round_.again, not lane.has_taken)
        if after is None:
            return round_.ended(limited)
        return Round(after, limited, round_.again)

    def _offer_in_order(self, has_alone=False):
        """Offer what comes first over all.  True: this was all there is."""
        pick, passed = self.pick, 0
        offer, most = pick.offer, pick.room + _PASS_ROWS
        alone = self._alone_rows() if has_alone else {}
        rows = self._connection.execute(
            _TASK_ROW + " order by priority, place, id limit :most", {"most": most}
        )
        with contextlib.closing(rows):
            merged = heapq.merge([*alone.values()], rows, key=order_of)
            for row in merged if alone else rows:
                if alone and alone.pop(row[ROW_ID], None):
                    pick.offer_alone(row)
                else:
                    passed += not offer(row)
                if pick.is_full:
                    return False
                if passed == _PASS_ROWS:
                    break
            else:
                return True
        for row in alone.values():          # they are in none of the groups
            pick.offer_alone(row)
        return False

    def _alone_rows(self):
        """Those that need a child to themselves, by their ids, in order."""
        rows = self._connection.execute(
            _ALONE_ROW + " order by priority, place, id limit :most",
            {"most": self.order.alone + _PASS_ALONE},
        )
        return {row[ROW_ID]: row for row in rows}

    def _groups(self, lane, round_):
        """(the first rows of groups from the round's last one on, the last one seen).

        Leaps from one known name to the next, so what is unknown, paused or not
        served costs one seek, however much it is.  Goes so many steps at most; the
        last one seen is None when no group is left.
        """
        pick, order = self.pick, self.order
        if lane.is_full:
            return [], round_.after
        queue, name = round_.after or FIRST_GROUP
        names = sorted(n for n in order.names if n not in pick.limited
                       and (n in order.beside_names) == lane.is_beside)
        queues = order.queues and sorted(order.queues)
        heads: list[tuple] = []
        for _ in range(_SEEK_STEPS):
            i = bisect.bisect_right(names, name)
            row = self._head(queue, names[i]) if i < len(names) else None
            if row is None or row[ROW_PAUSED]:
                queue, name = self._next_queue(queues, queue), ""
                if queue is None or not names:
                    return heads, None
                continue
            name = row[ROW_NAME]
            i = bisect.bisect_left(names, name)
            if names[i : i + 1] != [name]:      # unknown, or at its limit
                continue
            if not pick.waits(name):
                heads.append(row)
                continue
            del names[i]
            if pick.is_full:
                break
        return heads, (queue, name)

    def _head(self, queue, name):
        """The first row of a queue in order of name, from this name on."""
        return self._connection.execute(
            _TASK_ROW + """ and queue = :queue and name >= :name
                order by name, priority, place, id limit 1""",
            {"queue": queue, "name": name},
        ).fetchone()

    def _next_queue(self, queues, queue):
        """The next queue that has something ready; the next of `queues`, if given.

        Leaps over paused ones in the same statement, so many at most.
        """
        if queues is not None:
            i = bisect.bisect_right(queues, queue)
            return queues[i] if i < len(queues) else None
        return self._connection.execute(
            f"""with recursive leap (queue) as (
                    select min(queue) from bg_task
                        where state = {QUEUED} and alone = 0 and queue > :queue
                    union all
                    select (select min(queue) from bg_task
                            where state = {QUEUED} and alone = 0
                                and queue > leap.queue)
                        from leap join bg_queue on bg_queue.name = leap.queue
                    limit :most)
                select queue from leap""",
            {"queue": queue, "most": _LEAPS},
        ).fetchall()[-1][0]

    def _offer_groups(self, heads):
        """Offer the rows of these groups in order, reading no further than needed."""
        pick = self.pick
        heap = [(order_of(head), head, None) for head in heads]
        heapq.heapify(heap)
        taken = {run.id for run in pick.runs}
        with contextlib.ExitStack() as cursors:
            while heap and not pick.is_full:
                _, row, rest = heapq.heappop(heap)
                if row[ROW_ID] not in taken and not pick.offer(row, follows=False):
                    continue                # nor can the others of its group
                if rest is None:
                    rest = self._rest(row, pick.room + len(taken))
                    cursors.enter_context(contextlib.closing(rest))
                row = next(rest, None)
                if row is not None:
                    heapq.heappush(heap, (order_of(row), row, rest))

    def _rest(self, head, most):
        """A cursor on the rows of a group behind its first."""
        return self._connection.execute(
            _TASK_ROW + """ and queue = :queue and name = :name
                order by priority, place, id limit :most offset 1""",
            {"queue": head[ROW_QUEUE], "name": head[ROW_NAME], "most": most},
        )

    def _tat(self, limit):
        row = self._connection.execute(
            """select tat from bg_rate where name = :name""", {"name": limit}
        ).fetchone()
        return row[0] if row else 0.0

    def _running(self, name, most):
        """How many runs of a name there are, of all workers; `most` at most.

        Leaps from worker to worker: it is one seek for each that runs anything.
        """
        return self._connection.execute(
            f"""with recursive holder (id) as (
                    select min(worker) from bg_task where state = {RUNNING}
                    union all
                    select (select min(worker) from bg_task
                            where state = {RUNNING} and worker > holder.id)
                        from holder where holder.id is not null)
                select count(*) from (
                    select 1 from holder cross join bg_task
                        where state = {RUNNING} and worker = holder.id and name = :name
                        limit :most)""",
            {"name": name, "most": most},
        ).fetchone()[0]


def _standing(connection, worker):
    """(the worker has its row, when the first task is due that waits for its time,
    something ready needs a child to itself)."""
    return connection.execute(
        f"""select exists (select 1 from bg_worker where id = :worker),
                (select run_at from bg_task where state < {QUEUED}
                    order by run_at limit 1),
                exists (select 1 from bg_task where state = {QUEUED} and alone <> 0)""",
        {"worker": worker},
    ).fetchone()


def queue_behind(connection, ids):
    """Make tasks ready, each with a place of its own behind all others.

    What is enqueued after that takes the same place, but has a higher id.
    """
    if not ids:
        return
    place, = connection.execute(
        """select value from bg_meta where name = 'place'"""
    ).fetchone()
    connection.executemany(
        f"""update bg_task set state = {QUEUED}, place = ? where id = ?""",
        [(place + n, task_id) for n, task_id in enumerate(ids, 1)],
    )
    connection.execute(
        """update bg_meta set value = value + :more where name = 'place'""",
        {"more": len(ids)},
    )


class Claims(Queue):
    """The verbs of workers that look for work."""

    def peek(self, order: ClaimOrder, now: int) -> tuple[bool, Claimed]:
        connection = self.db.link().connection
        free = min(order.free, 1)
        ahead = 0 if free else min(order.ahead, 1)
        order = order._replace(free=free, ahead=ahead, beside=min(order.beside, 1))
        try:
            _, due, has_alone = _standing(connection, order.worker)
            if due is not None and due <= now:
                return True, Claimed([], now, order.round)
            look = Look(connection, order, now, has_alone)
        except sqlite3.Error as exc:
            raise explained(exc, self.db.path) from exc
        return bool(look.pick.runs), look.seen(due)

    def _claim(self, connection, order, now):
        """Take the next runs for a worker that still has its row in bg_worker.

        Stops at the first task that needs a free child when none is left, so that
        those behind it cannot pass it for ever.
        """
        is_registered, due, has_alone = _standing(connection, order.worker)
        if not is_registered:
            return Claimed([], None, Round(), is_registered=False)
        if due is not None and due <= now:
            self._promote(connection, now)
            _, due, has_alone = _standing(connection, order.worker)
        look = Look(connection, order, now, has_alone)
        self._take(connection, look, now)
        return look.seen(due)

    def _promote(self, connection, now):
        """Make ready what was waiting for its time.

        A retry goes behind all that is ready or was enqueued by then, or one that
        asks for no delay would run again and again before the others.
        """
        ready = connection.execute(
            f"""select id, state from bg_task where state < {QUEUED} and run_at <= :now
                order by run_at limit :batch""",
            {"now": now, "batch": PROMOTE_BATCH},
        ).fetchall()
        connection.executemany(
            f"""update bg_task set state = {QUEUED} where id = ?""",
            [(task_id,) for task_id, state in ready if state == SCHEDULED],
        )
        queue_behind(
            connection, [task_id for task_id, state in ready if state == RETRYING]
        )

    def _take(self, connection, look, now):
        """Mark the picked as running, and their starts as spent.

        What else lies in a range of ids is in another state or place: the write
        lock is held since the rows were read.
        """
        connection.executemany(
            f"""update bg_task set state = {RUNNING}, worker = ?, attempt = attempt + 1,
                    started_at = ?, callbacks = ?
                where state = {QUEUED} and alone = 0 and priority = ? and place = ?
                    and id between ? and ?""",
            [(look.order.worker, now, *key, *ids) for key, *ids in look.pick.ranges],
        )
        if look.pick.loners:
            connection.executemany(
                f"""update bg_task set state = {RUNNING}, worker = ?,
                        attempt = attempt + 1, started_at = ?, callbacks = ?
                    where id = ?""",
                [(look.order.worker, now, run.callbacks, run.id)
                 for run in look.pick.loners],
            )
        if look.limits:
            connection.executemany(
                """insert or replace into bg_rate (name, tat) values (?, ?)""",
                look.limits.spent(),
            )

    def _return_tokens(self, connection, runs):
        """Give the limits back what runs have spent that never began."""
        tokens = [(ms, limit) for run in runs for limit, ms in run.tokens]
        if tokens:
            connection.executemany(
                """update bg_rate set tat = tat - ? where name = ?""", tokens
            )


# == Attempts =================================================================
# Owns what is kept, for people, of the runs of a task that are over: a record of
# each, but of a first run that simply succeeded, which is in the row itself; and what
# those before the last one have printed.  It is written with the end of a run, goes
# with the task, and stays when that is retried.  Knows nothing of what an end means.

_MOST_ATTEMPTS = 20         # of a task, the newest
_MOST_OUTPUTS = 5           # … of those before the last
_OUTPUT_CHARS = 16_000      # of each of these: its beginning, and its end
_ERROR_CHARS = 300          # of an error's message, in a record
_LARGEST = 1 << 53          # number in a record that somebody may have edited
_OUTCOMES = {SUCCESS: "success", FAILED: "failed", CANCELLED: "cancelled",
             RETRYING: "retried"}
_KEPT = f"""
    select attempt, state, started_at, run_at, duration,
        (select name from bg_worker where id = ifnull(:worker, bg_task.worker)),
        (select body from bg_payload where id = :id * 8 + {ATTEMPTS}),
        (select body from bg_payload where id = :id * 8 + {OUTPUTS}),
        (select body from bg_payload where id = :id * 8 + {OUTPUT}),
        (select body from bg_payload where id = :id * 8 + {ERROR})
    from bg_task where id = :id"""


def read_error(text):
    """The error that a payload describes, or None for none."""
    error = _parsed(text, dict)
    if text and not error.get("kind"):
        return {"kind": "exception", "message": text}       # edited by hand
    return error or None


def keep_attempt(connection, run, worker, ended, queued="forgiven", name=None):
    """Keep a record of a run, whose end was written just now, and what the one before
    it has printed: before that is deleted, see drop_old().

    `ended` has what the row has not; `queued` says what it is if that is queued again.
    """
    _, state, began, _, _, known_as, attempts, outputs, output, _ = connection.execute(
        _KEPT, {"id": run.id, "worker": worker}).fetchone()
    started_at = ended.get("started_at") or began
    _put_attempt(connection, run.id, attempts, {
        **ended, "attempt": run.attempt, "started_at": started_at,
        "waited": _waited(started_at, run.run_at), "worker": name or known_as,
        "outcome": _OUTCOMES.get(state, queued),
    })
    if output is not None and run.attempt > 1:
        _put_output(connection, run.id, outputs, run.attempt - 1, output)


def ending_of(outcome: Outcome) -> dict:
    """What a record has of an outcome."""
    return {"started_at": outcome.started_at, "duration": outcome.duration,
            **error_head(outcome.error or {})}


def error_head(error: dict) -> dict:
    """What a record has of an error."""
    parts = {part: error.get(part)
             for part in ("kind", "type", "signal", "exit_code", "peak", "cpu")}
    return {**parts, "error": str(error.get("message") or "")[:_ERROR_CHARS]}


def keep_last(connection, task_id):
    """The same for the last run of a finished task, before that is queued again."""
    attempt, state, began, run_at, duration, worker, attempts, outputs, output, error \
        = connection.execute(_KEPT, {"id": task_id, "worker": None}).fetchone()
    known = [record["attempt"] for record in _records(attempts)]
    if attempt and attempt not in known and state in (SUCCESS, FAILED):
        _put_attempt(connection, task_id, attempts, {
            "attempt": attempt, "started_at": began, "duration": duration,
            "waited": _waited(began, run_at), "worker": worker,
            "outcome": _OUTCOMES[state], **error_head(read_error(error) or {}),
        })
    if output is not None:
        _put_output(connection, task_id, outputs, attempt, output)


def _waited(started_at, run_at):
    return None if started_at is None else max(0, started_at - run_at) / 1000


def _put_attempt(connection, task_id, text, record):
    """Add to the records that there are, in place of one with the same number."""
    number = record["attempt"]
    others = [old for old in _records(text) if old["attempt"] != number]
    new = {k: v for k, v in record.items() if v not in (None, "")}
    put_payload(connection, task_id, ATTEMPTS,
                to_json([*others[1 - _MOST_ATTEMPTS:], new]))


def _put_output(connection, task_id, text, attempt, output):
    if len(output) > _OUTPUT_CHARS:
        half = _OUTPUT_CHARS // 2
        output = f"{output[:half]}\n[{len(output) - 2 * half:,} characters are not " \
            f"kept]\n{output[-half:]}"
    kept = {**_outputs(text), attempt: output}
    newest = sorted(kept.items())[-_MOST_OUTPUTS:]
    put_payload(connection, task_id, OUTPUTS, to_json(dict(newest)))


def _parsed(text, kind):
    """A payload; empty for what somebody has written who is not us."""
    found = None
    if text:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            found = json.loads(text)
    return found if isinstance(found, kind) else kind()


def _records(text):
    """The records in a payload, as far as each can be one."""
    return [record for record in _parsed(text, list)
            if isinstance(record, dict) and _is_of("attempt", record.get("attempt"))]


def _is_of(field, value):
    """True for what this field of a record may have."""
    if not isinstance(value, ATTEMPT_FIELDS[field]) or isinstance(value, bool):
        return False
    return isinstance(value, str) or abs(value) <= _LARGEST     # and no NaN


def _outputs(text):
    """What earlier runs have printed, by number."""
    return {int(number): output for number, output in _parsed(text, dict).items()
            if re.fullmatch("[0-9]{1,9}", number) and isinstance(output, str)}


class Attempts:
    """What can be read of them."""

    db: Database

    def _kept_of(self, task_id):
        rows = self.db.read(_KEPT, {"id": row_id(task_id), "worker": None})
        if not rows:
            raise TaskNotFound(f"no task {task_id} in {self.db.path}")
        return rows[0]

    def attempts(self, task_id: int) -> list[dict]:
        attempt, state, began, run_at, duration, worker, text, *_ = \
            self._kept_of(task_id)
        records = _records(text)
        if state == SUCCESS and attempt not in [old["attempt"] for old in records]:
            records.append({
                "attempt": attempt, "started_at": began, "duration": duration,
                "waited": _waited(began, run_at), "worker": worker,
                "outcome": _OUTCOMES[state],
            })
        return [
            {field: record[field] if _is_of(field, record.get(field)) else None
             for field in ATTEMPT_FIELDS}
            for record in records[-_MOST_ATTEMPTS:]
        ]

    def attempt_output(self, task_id: int, attempt: int) -> str | None:
        newest, state, *_, outputs, output, _ = self._kept_of(task_id)
        is_last = attempt == newest - (state == RUNNING)    # of those that are over
        if is_last and output is not None:      # else it was queued again since then
            return output
        return _outputs(outputs).get(attempt)


# == Live rows ================================================================
# Owns the SQL of what workers tell of themselves while they work: their state, their
# children, what they know and what they have in hand.  None of it is needed to run a
# task: it is written without waiting for the disk, and goes with the worker.

def take_off(connection, worker):
    """Delete a worker, with all that it has told; but its CPU time is kept."""
    for name, column in (("worker_cpu", "cpu"), ("children_cpu", "children_cpu")):
        # As a number within reason, whatever somebody has written there by hand.
        connection.execute(
            f"""insert into bg_meta (name, value)
                select :name, cast(max(0, min(1e14,
                    cast(ifnull({column}, 0) as real) * 1000)) as integer)
                from bg_worker where id = :id
                on conflict (name) do update
                    set value = min(1000000000000000, value + excluded.value)""",
            {"id": worker, "name": name},
        )
    connection.execute("""delete from bg_worker where id = :id""", {"id": worker})
    connection.execute(
        """delete from bg_worker_task where worker = :id""", {"id": worker})
    connection.execute("""delete from bg_child where worker = :id""", {"id": worker})
    connection.execute("""delete from bg_run where worker = :id""", {"id": worker})


_PRINTED = """
    select seq, at, body from bg_output
    where task = ? and attempt = ? and seq > ? order by seq"""


def forget_live(connection, run, worker):
    """It is over, or it was returned: what was told of it meanwhile goes."""
    connection.execute(
        """delete from bg_run where task = ? and worker = ? and attempt = ?""",
        (run.id, worker, run.attempt))
    connection.execute(
        """delete from bg_output where task = ? and attempt = ?""",
        (run.id, run.attempt))


def keep_printed(connection, run, worker):
    """The same where nobody else knows what it has printed: that becomes its output."""
    rows = connection.execute(_PRINTED, (run.id, run.attempt, -1)).fetchall()
    if rows:
        kept = kept_of(itertools.starmap(OutputRow, rows))
        put_payload(connection, run.id, OUTPUT, kept.text())
    forget_live(connection, run, worker)


WORKER_ROW = """
    select id, name, pid, host, boot, port, token, queues, concurrency, started_at,
        beat_at, running, live, start_method, state, note, memory, cpu, children_cpu,
        rate, version, max_memory, timeout
    from bg_worker """


def _read_names(text):
    """The names in a JSON array; none of what somebody has written there by hand."""
    try:
        return tuple(map(str, json.loads(text or "[]")))
    except (ValueError, TypeError, RecursionError):
        return ()


class LiveRows:
    """The verbs about what runs now."""

    db: Database

    def add_worker(self, values: dict, lock: Callable[[int], Any]) -> int:
        known: Sequence[KnownTask] = values.get("tasks", ())
        values = {"start_method": "", "rate": None, "version": None,
                  "max_memory": None, "timeout": None, **values}
        values.pop("tasks", None)
        with self.db.write(durable=False) as link:
            worker = link.connection.execute(
                """insert into bg_worker (name, pid, host, boot, port, token, queues,
                        concurrency, started_at, beat_at, live, start_method, state,
                        rate, version, max_memory, timeout)
                    values (:name, :pid, :host, :boot, :port, :token, :queues,
                        :concurrency, :now, :now, :live, :start_method, 'starting',
                        :rate, :version, :max_memory, :timeout)""", values,
            ).lastrowid
            link.connection.executemany(
                """insert into bg_worker_task (worker, name, rate, max_running, params)
                    values (?, ?, ?, ?, ?)""",
                [(worker, task.name, task.rate, task.max_running or None,
                  to_json(list(task.params))) for task in known])
            lock(worker)
            return worker

    def beat(self, worker: int, running: int, live: int, now: int,
             vitals: Vitals = Vitals()) -> bool:
        *of_worker, children = vitals
        with self.db.write(durable=False, patience=0.5) as link:
            if not link.connection.execute(
                """update bg_worker
                    set beat_at = ?, running = ?, live = ?,
                        state = ?, note = ?, memory = ?, cpu = ?, children_cpu = ?
                    where id = ?""",
                (now, running, live, *of_worker, worker),
            ).rowcount:
                return False
            link.connection.execute(
                """delete from bg_child where worker = :id""", {"id": worker})
            link.connection.executemany(
                """insert or replace into bg_child (worker, pid, running, memory, cpu)
                    values (?, ?, ?, ?, ?)""",
                [(worker, *child[1:]) for child in children])
        return True

    def children(self) -> list[ChildRow]:
        rows = self.db.read(
            """select worker, pid, running, memory, cpu from bg_child
                where worker in (select id from bg_worker) order by worker, pid""")
        return [ChildRow(*row) for row in rows]

    def known_tasks(self) -> list[KnownTask]:
        rows = self.db.read(
            """select worker, name, rate, params, ifnull(max_running, 0)
                from bg_worker_task
                where worker in (select id from bg_worker) order by name, worker""")
        return [KnownTask(worker, name, rate, _read_names(params), most)
                for worker, name, rate, params, most in rows]

    _IS_OURS = f"""
        where exists (select 1 from bg_task
            where id = ?1 and state = {RUNNING} and worker = ?2 and attempt = ?3)"""

    def note_runs(self, worker: int, rows: Sequence[RunRow],
                  gone: Sequence[tuple[int, int]], printed: Sequence[PrintedRun],
                  now: int) -> None:
        with self.db.write(durable=False, patience=0.1) as link:
            by = link.connection
            by.executemany(
                """delete from bg_run where task = ? and attempt = ? and worker = ?""",
                [(*of, worker) for of in gone])
            by.executemany(
                """insert or replace into bg_run
                        (task, worker, attempt, pid, began_at, behind)
                    select ?1, ?2, ?3, ?4, ?5, ?6""" + self._IS_OURS, rows)
            for run, parts, size in printed:
                self._append(by, run, worker, parts, size, now)

    def _append(self, connection, run, worker, parts, size, now):
        """Rows that lie between the beginning and the end, for sure, go."""
        connection.executemany(
            """insert or replace into bg_output (task, attempt, seq, at, body)
                select ?1, ?3, ?4, ?5, ?6""" + self._IS_OURS,
            [(run.id, worker, run.attempt, seq, now, body) for seq, body in parts])
        connection.execute(
            """delete from bg_output where task = :id and attempt = :attempt
                and seq >= :head and seq <= :last""",
            {"id": run.id, "attempt": run.attempt, "head": OUTPUT_PART,
             "last": size - OUTPUT_PART - OUTPUT_CHUNK})

    def runs(self) -> list[RunRow]:
        rows = self.db.read(
            """select task, worker, attempt, pid, began_at, behind from bg_run
                where worker in (select id from bg_worker)
                order by began_at is null, began_at, task""")
        return [RunRow(*row) for row in rows]

    def live_output(self, task_id: int, attempt: int,
                    after: int = -1) -> list[OutputRow]:
        rows = self.db.read(_PRINTED, (row_id(task_id), attempt, after))
        return [OutputRow(*row) for row in rows]

    def departed_cpu(self) -> tuple[float, float]:
        found = dict(self.db.read(
            """select name, value from bg_meta
                where name in ('worker_cpu', 'children_cpu')"""))
        own, childrens = found.get("worker_cpu", 0), found.get("children_cpu", 0)
        return own / 1000, childrens / 1000


# == History ==================================================================
# Owns the SQL of bg_history.  Workers add the runs of a minute, in the transaction
# that writes their ends; roll_up() adds each quarter of an hour that is over to its
# row, to its day, and to what is since ever.  A minute is added once: those before
# bg_meta.rolled_to were, and nothing is counted in one of them any more.

_LATE_SECONDS = 600         # after the end of a quarter until it is rolled up
_MOST_ROWS = 200_000        # above that the oldest quarters go, and then days
_FORGET_BATCH = 2000        # rows that one transaction deletes, about
_NUMBERS = (
    "runs", "failed", "retried", "cancelled", "exceptions", "crashed", "timeouts",
    "lost", "aborted", "ran_ms", "waited_ms",
    *(f"{kind}{n}" for kind in "rw" for n in range(len(HISTORY_BOUNDS) + 1)),
)
_FIRST_RAN = 6 + _NUMBERS.index("r0")       # where they stand in a row of the table
_FIRST_WAITED = 6 + _NUMBERS.index("w0")
_COLUMNS = ", ".join(("span", "at", "name", "queue", "lo", "hi", *_NUMBERS))
# total() and the cast: no number written by hand is too large, or none at all.
_SUMS = "min(lo), max(hi), " + ", ".join(
    f"cast(total({number}) as integer)" for number in _NUMBERS)
_ADD = f"""
    insert into bg_history ({_COLUMNS}) values (?{", ?" * (5 + len(_NUMBERS))})
    on conflict (span, at, name, queue) do update set
        lo = min(lo, excluded.lo), hi = max(hi, excluded.hi),
        """ + ", ".join(f"{n} = {n} + excluded.{n}" for n in _NUMBERS)
_ROLLED_TO = """ifnull((select value from bg_meta where name = 'rolled_to'), 0)"""
_WHERE = """at >= :since and at < :until
    and (:name is null or name = :name) and (:queue is null or queue = :queue)"""
_HISTORY = f"""
    select :span, min(at), case when min(name) = max(name) then min(name) else '' end,
        case when min(queue) = max(queue) then min(queue) else '' end, {_SUMS}
    from (
        select {_COLUMNS} from bg_history where span = :span and {_WHERE}
        union all
        select span, at / :span * :span, name, queue, lo, hi, {", ".join(_NUMBERS)}
            from bg_history where :span > {MINUTE} and span = {MINUTE}
                and at >= {_ROLLED_TO} and {_WHERE})
    group by """
_GROUPS = {"": "at, name, queue", "at": "at", "queue": "at, queue",
           "name": "name, queue"}
_TYPES = [int, int, str, str, int, int, *(int for _ in _NUMBERS)]


def add_history(connection, counts, now):
    """Add runs to the minute of now; or to the first one that is still open.

    Then the clock was set back, or the time of one that was ahead is still to come.
    """
    if not counts:
        return
    rolled_to, = connection.execute(f"""select {_ROLLED_TO}""").fetchone()
    _add(connection, counts.rows(MINUTE, max(now // 60_000 * 60, rolled_to)))


def _add(connection, rows):
    connection.executemany(
        _ADD, [(*row[:-2], *row.ran, *row.waited) for row in rows])


def _history_row(values):
    """A row of the table, or of sums of it, for all others."""
    if [*map(type, values)] != _TYPES:          # edited by hand
        values = (*map(_whole, values[:2]), *map(str, values[2:4]),
                  *map(_whole, values[4:]))
    return HistoryRow._make((
        *values[:_FIRST_RAN], values[_FIRST_RAN:_FIRST_WAITED],
        values[_FIRST_WAITED:]))


def _whole(value):
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return 0


class History:
    """The verbs of history."""

    db: Database
    now: Callable[[], int]

    def history(self, span: int, since: int, until: int | None = None,
                name: str | None = None, queue: str | None = None,
                by: str = "") -> list[HistoryRow]:
        if span not in HISTORY_KEPT or by not in _GROUPS:
            raise ValueError(f"no history of {span!r} seconds by {by!r}")
        until = self.now() if until is None else until
        rows = self.db.read(_HISTORY + f"{_GROUPS[by]} order by {_GROUPS[by]}", {
            "span": span, "since": since // 1000 // span * span,
            "until": -(-until // 1000), "name": name, "queue": queue,
        })
        return [_history_row(row) for row in rows]

    def totals(self) -> list[HistoryRow]:
        rows = self.db.read(
            f"""select 0, 0, name, queue, {_SUMS} from (
                    select * from bg_history where span = 0
                    union all select * from bg_history
                        where span = {MINUTE} and at >= {_ROLLED_TO})
                group by name, queue"""
        )
        return [_history_row(row) for row in rows]

    def roll_up(self, now: int) -> bool:
        second = now // 1000
        over = (second - _LATE_SECONDS) // QUARTER * QUARTER
        rolled_to, first = self._open_minutes()
        if rolled_to > second + QUARTER:
            return self._begin_anew(second)
        if first is None or first >= over:
            return self._forget(second)
        with self.db.write(durable=False, patience=0.5) as link:
            _, first = self._open_minutes()         # another may have done it
            if first is not None and first < over:
                start = first // QUARTER * QUARTER
                rows = self._minutes(first, start + QUARTER)
                for span, at in ((QUARTER, start), (DAY, start // DAY * DAY), (0, 0)):
                    self._add_some(link.connection, span, at, rows)
                self._set_rolled_to(link.connection, start + QUARTER)
        return True

    def _open_minutes(self):
        """(the end of what is rolled up, the first minute with runs after that)."""
        return self.db.read(
            f"""select {_ROLLED_TO}, (select at from bg_history
                where span = {MINUTE} and at >= {_ROLLED_TO} order by at limit 1)"""
        )[0]

    def _minutes(self, first, end):
        """What was counted from a minute on; what has run most is first."""
        rows = self.db.read(
            f"""select {MINUTE}, 0, name, queue, {_SUMS} from bg_history
                where span = {MINUTE} and at >= :first and at < :end
                group by name, queue order by total(runs) desc, name, queue""",
            {"first": first, "end": end},
        )
        return [_history_row(row) for row in rows]

    def _add_some(self, connection, span, at, rows):
        """Add them to a span, which tells only so many names and queues apart."""
        places = RunCounts(set(self.db.read(
            """select name, queue from bg_history where span = :span and at = :at""",
            {"span": span, "at": at},
        )))
        _add(connection, [
            HistoryRow(span, at, *places.place(row[2:4]), *row[4:]) for row in rows])

    def _set_rolled_to(self, connection, second):
        connection.execute(
            """insert or replace into bg_meta (name, value)
                values ('rolled_to', :second)""",
            {"second": second},
        )

    def _begin_anew(self, second):
        """The clock was set back: go on from the next quarter of an hour.

        What was counted at a time that is still to come stays in the sum since ever,
        and is in no chart: it would be counted again.
        """
        start = (second // QUARTER + 1) * QUARTER
        with self.db.write(durable=False, patience=0.5) as link:
            rolled_to, first = self._open_minutes()
            if rolled_to > second + QUARTER:        # else another was faster
                if first is not None:
                    rows = self._minutes(rolled_to, MOST_ID)
                    self._add_some(link.connection, 0, 0, rows)
                link.connection.execute(
                    """delete from bg_history where span > 0 and at >= :start""",
                    {"start": start},
                )
                self._set_rolled_to(link.connection, start)
        return True

    def _forget(self, second):
        """Delete a batch of what is too old, or too much; True: there is more."""
        for span, seconds in HISTORY_KEPT.items():
            if self._delete_first(span, second - seconds):
                return True
        number = self.db.read("""select count(*) from bg_history""")[0][0]
        return number > _MOST_ROWS and (
            self._delete_first(QUARTER, second, number - _MOST_ROWS)
            or self._delete_first(DAY, second, number - _MOST_ROWS))

    def _delete_first(self, span, before, most=_FORGET_BATCH):
        """Delete the oldest rows of a span, about so many; False: there were none."""
        rows = self.db.read(
            """select at from bg_history where span = :span and at < :before
                order by at limit :most""",
            {"span": span, "before": before, "most": min(most, _FORGET_BATCH)},
        )
        if rows:
            with self.db.write(durable=False, patience=0.5) as link:
                link.connection.execute(
                    """delete from bg_history where span = :span and at <= :last""",
                    {"span": span, "last": rows[-1][0]},
                )
        return bool(rows)


# == Endings ==================================================================
# Owns what becomes of runs, and the SQL that writes it: success, failure, another
# run, a hand-back, and what is enqueued with an end.  An end is only written while
# the run is still its worker's.  Knows nothing of when to retry: see settle().

_CALLBACK_SECONDS = 60.0    # limit of a callback whose task has none
_STOPPED = "its worker was stopped: it runs again"


def callback_rows(run: Run, state: int, error: dict | None, now: int,
                  worker: str) -> tuple:
    """The (NewTask, arguments) to be committed with this end of a run.

    A task of its own, in the queue of the one it is about: what calls back is as
    durable as what is called back about, and is run again when it fails.
    """
    if not run.callbacks:
        return ()
    calls = []
    bit, option = CALLBACKS.get(state, (0, ""))
    if run.callbacks & bit:
        args = [run.id] if state == SUCCESS else [run.id, error]
        calls.append((f"{run.name}:{option}", args, run.timeout or _CALLBACK_SECONDS))
    for kind in _kinds_of(state, error):
        if run.callbacks & LISTENED[kind]:
            about = {"kind": kind, "id": run.id, "name": run.name, "queue": run.queue,
                     "attempt": run.attempt, "error": error, "worker": worker,
                     "at": now}
            calls.append((f"on:{kind}", [about], _CALLBACK_SECONDS))
    return tuple((
        NewTask(name, run.queue, run.priority, None, RetryPolicy().retries, limit,
                QUEUED, now, now), to_json([args, {}]))
        for name, args, limit in calls)


_HEARD = {SUCCESS: "success", FAILED: "failure", RETRYING: "retry", QUEUED: "retry"}


def _kinds_of(state, error):
    """What those who listen hear of an end: what follows it, then what it was."""
    kinds = [_HEARD[state]] if state in _HEARD else []
    kind = (error or {}).get("kind")
    return [*kinds, kind] if kind in LISTENED and state != SUCCESS else kinds


_MOST_UNHEARD = 1000        # that wait for the listeners of a kind, in one queue


def without_crowds(connection: sqlite3.Connection, rows: Iterable) -> list:
    """Those of the rows that follow ends for which there is room.

    Where a thousand wait to be told, one more is no news, and costs the disk.
    """
    room: dict[tuple, int] = {}
    kept = []
    for row in rows:
        task, _ = row
        group = task.queue, task.name
        if callback_kind(task.name) == task.name:
            if group not in room:
                room[group] = _MOST_UNHEARD - connection.execute(
                    f"""select count(*) from (
                            select 1 from bg_task where state = {QUEUED} and alone = 0
                                and queue = ? and name = ? limit ?)""",
                    (*group, _MOST_UNHEARD),
                ).fetchone()[0]
            room[group] -= 1
        if room.get(group, 0) >= 0:
            kept.append(row)
    return kept


# What SQLite says to values that it cannot take: too long, too large, against a
# check, no Unicode.  Anything else is about the database, not about what is written.
_REFUSALS = (
    sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, OverflowError,
    UnicodeError, MemoryError,
)


def _is_plain(outcome):
    """True for a first success that is all in its row: most are."""
    run = outcome.run
    is_first = outcome.state == SUCCESS and run.attempt == 1 and run.tick is None
    is_small = len(outcome.result or "") <= INLINE_CHARS
    return is_first and is_small and not (
        outcome.output or outcome.then or outcome.run.is_noted)


def _leaves_record(outcome):
    """False for a first success, and for what was cancelled before it had begun."""
    if outcome.state == SUCCESS:
        return outcome.run.attempt > 1
    return outcome.state != CANCELLED or outcome.duration is not None


def _stays_alone(outcome):
    """1 if the next run has a child to itself, too.

    A run that came to an end of its own while it was alone is no danger to others.
    One that has not come to its end, or has taken the child with it, may be.
    """
    is_danger = outcome.state == QUEUED or (outcome.error or {}).get("kind") == "crash"
    return int(outcome.run.alone and is_danger)


def drop_old(connection, run, state):
    """Delete what an attempt before has left behind.

    Progress goes at the end of its own attempt, if another follows: what a
    later one finds is of that one itself.
    """
    if run.attempt > 1 or state not in FINISHED:
        connection.execute(
            """delete from bg_payload where id > :args and id <= :last""",
            {
                "args": run.id * 8 + ARGS,
                "last": run.id * 8 + (OUTPUT if state in FINISHED else PROGRESS),
            },
        )


def note_success(connection, run, now):
    """Write down that the run of a tick succeeded.

    Of several schedules of one task only that one whose last run this is can be told;
    where there is but one, a run that ends after the next tick counts as well.
    """
    connection.execute(
        """update bg_schedule set success_at = :now
            where task = :name and (last_id = :id or last_id > :id and 1 =
                (select count(*) from bg_schedule where task = :name))""",
        {"now": now, "name": run.name, "id": run.id},
    )


class Endings(Claims):
    """The verbs of workers at work: their turns, and what people ask of their runs."""

    def turn(self, turn: Turn, now: int, patience: float) -> Turned:
        worker = turn.worker
        with self.db.write(turn.is_durable, patience) as link:
            by = link.connection
            for run, progress in turn.progress:
                self._set_progress(by, run, worker, progress)
            self._give_back(by, turn.unbegun, worker, now, started=False)
            self._give_back(by, turn.stopped, worker, now, started=True)
            if turn.unbegun or turn.stopped:
                link.wake = wake_addresses(by)
            outcomes = self._heed_cancels(turn.outcomes, worker)
            outcomes, unheard = self._thin_out(by, outcomes)
            if not link.wake and any(o.run.is_counted for o in outcomes):
                link.wake = wake_addresses(by)
            stale = self._finish(link, outcomes, worker, now)
            if stale:
                outcomes = [outcome for outcome in outcomes if outcome not in stale]
            if turn.history is not None:
                add_history(by, turn.history.plus(outcomes), now)
            claimed = self._claim(by, turn.order, now) if turn.order else None
        return Turned(outcomes, stale, claimed, unheard)

    def _thin_out(self, connection, outcomes):
        """The outcomes, and how many of what follows them nobody will hear of."""
        rows = [row for outcome in outcomes for row in outcome.then]
        kept = without_crowds(connection, rows) if rows else rows
        if len(kept) == len(rows):
            return outcomes, 0
        ours = {id(row) for row in kept}
        return [
            o._replace(then=tuple(row for row in o.then if id(row) in ours))
            for o in outcomes
        ], len(rows) - len(kept)

    def _heed_cancels(self, outcomes, worker):
        """What somebody wants cancelled is not run again, and not said to be."""
        if RETRYING not in [outcome.state for outcome in outcomes]:
            return list(outcomes)
        asked = set(self.cancels_asked(worker))
        return [
            o._replace(state=CANCELLED, then=())
            if o.state == RETRYING and o.run.id in asked else o
            for o in outcomes
        ]

    _SUCCEED = f"""
        update bg_task set state = {SUCCESS}, finished_at = ?,
            started_at = ifnull(?, started_at), duration = ?, result = ?
        where id = ? and state = {RUNNING} and worker = ? and attempt = ?"""
    _FINISH = f"""
        update bg_task set
            state = case when cancel_asked and ? < {RUNNING}
                then {CANCELLED} else ? end,
            finished_at = case when cancel_asked or ? > {RUNNING} then ? end,
            started_at = ifnull(?, started_at), duration = ?, run_at = ?,
            result = ?, forgiven = forgiven + ?, attempt = attempt - ?, alone = ?
        where id = ? and state = {RUNNING} and worker = ? and attempt = ?"""

    def _finish(self, link, outcomes, worker, now):
        """Write what became of runs, and what follows it.  Returns the stale ones."""
        connection = link.connection
        unbegun = [o.run for o in outcomes
                   if o.state == CANCELLED and o.duration is None]
        self._return_tokens(connection, unbegun)
        if len(outcomes) > 1:
            plain: list[Outcome] = []
            others: list[Outcome] = []
            for outcome in outcomes:
                (plain if _is_plain(outcome) else others).append(outcome)
            if plain and self._succeed_all(connection, plain, worker, now):
                outcomes = others
        stale = []
        for outcome in outcomes:
            try:
                if not self._finish_one(link, outcome, worker, now):
                    stale.append(outcome)
            except _REFUSALS as exc:
                raise OutcomeRefused(outcome, exc) from exc
        return stale

    def _succeed_all(self, connection, outcomes, worker, now):
        """Write plain successes at once; False, and nothing, if one does not go."""
        connection.execute("savepoint plain")
        try:
            done = connection.executemany(self._SUCCEED, [
                (now, o.started_at, o.duration, o.result, o.run.id, worker,
                 o.run.attempt)
                for o in outcomes
            ]).rowcount
        except _REFUSALS:           # which one is it?
            done = -1
        if done != len(outcomes):
            connection.execute("rollback to plain")
        connection.execute("release plain")
        return done == len(outcomes)

    def _finish_values(self, outcome, worker, now, forgive=0, uncount=0):
        run, state = outcome.run, outcome.state
        return (
            state, state, state, now, outcome.started_at, outcome.duration,
            run.run_at if outcome.run_at is None else outcome.run_at,
            outcome.result, forgive, uncount, _stays_alone(outcome),
            run.id, worker, run.attempt,
        )

    def _finish_one(self, link, outcome, worker, now):
        connection = link.connection
        large = len(outcome.result or "") > INLINE_CHARS
        row = outcome._replace(result=None) if large else outcome
        values = self._finish_values(row, worker, now)
        if connection.execute(self._FINISH, values).rowcount == 0:
            return False
        if _leaves_record(outcome):
            keep_attempt(connection, outcome.run, worker, ending_of(outcome))
        drop_old(connection, outcome.run, outcome.state)
        if large:
            put_payload(connection, outcome.run.id, RESULT, outcome.result)
        if outcome.error is not None:
            error = to_json(outcome.error)
            put_payload(connection, outcome.run.id, ERROR, error)
        if outcome.run.is_noted:
            forget_live(connection, outcome.run, worker)
        if outcome.output:
            put_payload(connection, outcome.run.id, OUTPUT, outcome.output)
        if outcome.then:
            insert_all(link, [Request(row, [text]) for row, text in outcome.then])
        if outcome.run.tick is not None and outcome.state == SUCCESS:
            note_success(connection, outcome.run, now)
        return True

    def _give_back(self, connection, runs, worker, now, started):
        """Queue runs again that did not fail.

        One that never started is not counted; one that a stop interrupted is
        forgiven, so that (task, attempt) starts at most once.
        """
        if not runs:
            return
        values = [
            self._finish_values(
                Outcome(run, QUEUED), worker, now,
                forgive=int(started), uncount=int(not started),
            )
            for run in runs
        ]
        if not started:
            connection.executemany(self._FINISH, values)
            for run in runs:
                if run.is_noted:
                    forget_live(connection, run, worker)
            return self._return_tokens(connection, runs)
        for run, row in zip(runs, values):
            if connection.execute(self._FINISH, row).rowcount:      # it is ours, still
                lost = {"kind": "lost", "message": run.pardoned or _STOPPED}
                keep_attempt(connection, run, worker, error_head(lost))
                drop_old(connection, run, QUEUED)
                if run.is_noted:
                    keep_printed(connection, run, worker)

    def _set_progress(self, connection, run, worker, progress):
        """Store what a running task last said of its progress."""
        if self._is_running(connection, run, worker):
            put_payload(connection, run.id, PROGRESS, progress)

    def _is_running(self, connection, run, worker):
        return connection.execute(
            f"""select 1 from bg_task where id = :id and state = {RUNNING}
                and worker = :worker and attempt = :attempt""",
            {"id": run.id, "worker": worker, "attempt": run.attempt},
        ).fetchone() is not None

    def cancels_asked(self, worker: int) -> list[int]:
        rows = self.db.read(
            f"""select id from bg_task
                where state = {RUNNING} and worker = :worker and cancel_asked""",
            {"worker": worker},
        )
        return [row[0] for row in rows]

    def pauses_asked(self, worker: int) -> set[str]:
        if not self.db.read("""select 1 from bg_queue limit 1"""):    # as mostly
            return set()
        rows = self.db.read(
            f"""select name from bg_queue where name in
                (select queue from bg_task
                    where state = {RUNNING} and worker = :worker)""",
            {"worker": worker},
        )
        return {row[0] for row in rows}


# == Records ==================================================================
# Owns the SQL that reads one task, or all that there are.

TASK_COLUMNS = """id, state, queue, name, priority, key, attempt, retries, forgiven,
        timeout, worker, cancel_asked, run_at, created_at, started_at, finished_at,
        duration, tick"""
_TASK = f"""
    select {TASK_COLUMNS}
    from bg_task """

_UNFINISHED = (
    f"""select id from bg_task where state < {SUCCESS} and id in (?"""
    + ", ?" * (ID_BATCH - 1) + ")"
)


_NEWEST = 100_000           # tasks that are looked through for what has no index


class Records:
    """What can be read of tasks."""

    db: Database

    def _row(self, statement, task_id):
        """The row of a statement about one task.  Raises TaskNotFound."""
        rows = self.db.read(statement, {"id": row_id(task_id)})
        if not rows:
            raise TaskNotFound(f"no task {task_id} in {self.db.path}")
        return rows[0]

    def _kept(self, task_id, kind):
        """A payload; None where the task has none.  Raises TaskNotFound."""
        text = payload_of(self.db, row_id(task_id), kind)
        if text is None:
            self.state(task_id)
        return text

    def task(self, task_id: int) -> TaskRow:
        return TaskRow(*self._row(_TASK + "where id = :id", task_id))

    def state(self, task_id: int) -> int:
        return self._row("""select state from bg_task where id = :id""", task_id)[0]

    def unfinished(self, ids: list[int]) -> set[int]:
        padded = ids + ids[-1:] * (ID_BATCH - len(ids))
        return {row[0] for row in self.db.read(_UNFINISHED, padded)}

    def args(self, task_id: int) -> str:
        text, = self._row("""select args from bg_task where id = :id""", task_id)
        return text or payload_of(self.db, task_id, ARGS)

    def outcome(self, task_id: int) -> tuple[int, str | None, dict | None]:
        state, result, error = self._row(
            f"""select state,
                    ifnull(task.result, (
                        select body from bg_payload where id = :id * 8 + {RESULT})),
                    (select body from bg_payload where id = :id * 8 + {ERROR})
                from bg_task as task where id = :id""",
            task_id,
        )
        return state, result, read_error(error)

    def error(self, task_id: int) -> dict | None:
        return read_error(self._kept(task_id, ERROR))

    def output(self, task_id: int) -> str | None:
        return self._kept(task_id, OUTPUT)

    def progress(self, task_id: int) -> list | None:
        text = self._kept(task_id, PROGRESS)
        return json.loads(text) if text else None

    def newest_options(self, name: str) -> dict:
        rows = self.db.read(
            """select queue, priority, retries, timeout from bg_task
                where id > (select max(id) from bg_task) - :newest and name = :name
                order by id desc limit 1""",
            {"name": name, "newest": _NEWEST},
        )
        names = ("queue", "priority", "retries", "timeout")
        return dict(zip(names, rows[0])) if rows else {}

    def counts(self) -> list[tuple[str, str, int, int]]:
        return self.db.read(
            """select queue, name, state, count(*) from bg_task
                group by queue, name, state order by queue, name, state"""
        )

    def paused_queues(self) -> list[str]:
        return [row[0] for row in self.db.read("""select name from bg_queue""")]

    def finished_runs(self, limit: int) -> list[FinishedRun]:
        rows = self.db.read(
            f"""select name, state, run_at, started_at, finished_at, duration, attempt
                from bg_task where state > {RUNNING} order by id desc limit :limit""",
            {"limit": limit},
        )
        return [FinishedRun(*row) for row in rows]

    def count_old(self, before: int | None, failed_before: int | None) -> int:
        return self.db.read(
            """select count(*) from bg_task
                where (state in (:success, :cancelled) and finished_at < :before)
                or (state = :failed and finished_at < :failed_before)""",
            {"success": SUCCESS, "cancelled": CANCELLED, "failed": FAILED,
             "before": before, "failed_before": failed_before},
        )[0][0]


# == Lists ====================================================================
# Owns the SQL that reads many tasks for people: by an index where there is one, else
# by looking through so many at a time, until the time is up.  What has finished is
# never counted.  Each state of a task has an order, and a page goes on from a place
# in it: by what it says, so that it holds whatever happens to the tasks meanwhile.

BATCH = 500                 # tasks that one transaction of a command changes
_WINDOW = 20_000            # tasks that one statement looks through
_MOST_GROUPS = 200          # (queue, name) that are merged in the order of claims
_HEAD_ROWS = 8              # of a group and priority: one of them is about the oldest
_FAR = 10**17               # beyond what a row can have in the first column of an order
_LONGEST_TEXT = 1000        # characters that can be searched for
_NO_PAGE = "no page goes on from {!r}: give what the one before said was next"
_HIGHEST = "\U0010ffff"     # stands behind every name
_FEW_NEWEST = 500           # tasks among which a quiet minute ends
_MESSAGE_CHARS = 1000       # of an error's message in a list

_TOUCHED = "coalesce(finished_at, started_at, created_at)"      # see Filter.since
_FITS = f"""(:state is null or state = :state)
        and (:name is null or name = :name) and (:queue is null or queue = :queue)
        and (:since is null or {_TOUCHED} >= :since)
        and (:max_id is null or id <= :max_id)
        and (:error is null or exists (select 1 from bg_payload as p
            where p.id = bg_task.id * 8 + {ERROR} and p.body like :error escape '!'))
        and (:text is null or name like :text escape '!'
            or ifnull(args, (select body from bg_payload as p
                where p.id = bg_task.id * 8 + {ARGS})) like :coded escape '!'
            or exists (select 1 from bg_payload as p where
                p.id = bg_task.id * 8 + {ERROR} and p.body like :coded escape '!'))
    """


# What waits, and what runs, by queue; what is ready without its times: see _HEADS.
_BY_QUEUE = f"""
    select queue, state, count(*), min(run_at),
            min(case when run_at > :now then run_at end)
        from bg_task indexed by bg_delayed where state < {QUEUED} group by queue, state
    union all
    select queue, {QUEUED}, count(*), null, null
        from bg_task indexed by bg_group where state = {QUEUED} and alone = 0
        group by queue
    union all
    select queue, {QUEUED}, count(*), min(run_at), null
        from bg_task indexed by bg_alone where state = {QUEUED} and alone <> 0
        group by queue
    union all
    select queue, {RUNNING}, count(*), null, null
        from bg_task indexed by bg_running where state = {RUNNING} group by queue"""
_COUNTS = f"""
    select queue, name, state, count(*) from bg_task indexed by bg_delayed
        where state < {QUEUED} group by queue, name, state
    union all
    select queue, name, {QUEUED}, sum(number) from (
            select queue, name, count(*) as number from bg_task indexed by bg_group
                where state = {QUEUED} and alone = 0 group by queue, name
            union all
            select queue, name, count(*) from bg_task indexed by bg_alone
                where state = {QUEUED} and alone <> 0 group by queue, name)
        group by queue, name
    union all
    select queue, name, {RUNNING}, count(*) from bg_task indexed by bg_running
        where state = {RUNNING} group by queue, name
    union all
    select queue, name, state, count(*) from bg_task indexed by bg_bad
        where state > {SUCCESS} group by queue, name, state
    order by 1, 2, 3"""
# The first of each group and priority by a seek, and the eldest of the few that stand
# there: what was put off came in earlier than it became due.
_HEADS = f"""
    with recursive head (id) as (
        select (select id from bg_task indexed by bg_group
            where state = {QUEUED} and alone = 0
            order by queue, name, priority, place, id limit 1)
        union all
        select coalesce(
            (select t.id from bg_task as t indexed by bg_group
                where t.state = {QUEUED} and t.alone = 0 and t.queue = h.queue
                    and t.name = h.name and t.priority > h.priority
                order by t.priority, t.place, t.id limit 1),
            (select t.id from bg_task as t indexed by bg_group
                where t.state = {QUEUED} and t.alone = 0 and t.queue = h.queue
                    and t.name > h.name
                order by t.name, t.priority, t.place, t.id limit 1),
            (select t.id from bg_task as t indexed by bg_group
                where t.state = {QUEUED} and t.alone = 0 and t.queue > h.queue
                order by t.queue, t.name, t.priority, t.place, t.id limit 1))
            from head join bg_task as h on h.id = head.id)
    select h.queue, min((select min(run_at) from (
            select t.run_at from bg_task as t indexed by bg_group
                where t.state = {QUEUED} and t.alone = 0 and t.queue = h.queue
                    and t.name = h.name and t.priority = h.priority
                order by t.place, t.id limit {_HEAD_ROWS})))
        from head join bg_task as h on h.id = head.id group by h.queue"""
_READY_GROUPS = f"""
    with recursive head (id) as (
        select (select id from bg_task indexed by bg_group
            where state = {QUEUED} and alone = 0 order by queue, name limit 1)
        union all
        select coalesce(
            (select t.id from bg_task as t indexed by bg_group
                where t.state = {QUEUED} and t.alone = 0 and t.queue = h.queue
                    and t.name > h.name
                order by t.name limit 1),
            (select t.id from bg_task as t indexed by bg_group
                where t.state = {QUEUED} and t.alone = 0 and t.queue > h.queue
                order by t.queue, t.name limit 1))
            from head join bg_task as h on h.id = head.id
        limit :limit)
    select h.queue, h.name from head join bg_task as h on h.id = head.id"""


class Walk:
    """An order to go through tasks, by an index; a place in it is a tuple of `keys`."""

    def __init__(self, source: str, keys: tuple, is_down: bool = False):
        self.keys, self.is_down = keys, is_down
        columns, size = ", ".join(keys), len(keys)
        places = [", ".join(f":{end}{n}" for n in range(size)) for end in "ab"]
        ahead, back, down = ("<", ">=", " desc") if is_down else (">", "<=", "")
        order = ", ".join(key + down for key in keys)
        rest = f"from bg_task {source} and ({columns}) {ahead} ({places[0]})"
        until = f"and ({columns}) {back} ({places[1]}) and {_FITS}"
        self.rows = f"""select {columns}, {TASK_COLUMNS} {rest} {until}
            order by {order} limit :most"""
        self.number = f"""select count(*) from (select 1 {rest} {until} limit :most)"""
        self.window = f"""select {columns} {rest} order by {order}
            limit 1 offset {_WINDOW - 1}"""
        ends = (_FAR, -_FAR) if is_down else (-_FAR, _FAR)
        self.first, self.last = ((end, *[""] * (size - 1)) for end in ends)


def _bad(state, is_down):
    """Two: those that somebody has made finished by hand have no time."""
    source = f"indexed by bg_bad where state = {state} and state > {SUCCESS}"
    return [Walk(source, ("finished_at", "name", "queue", "id"), is_down),
            Walk(source + " and finished_at is null", ("abs(0)", "name", "queue", "id"),
                 is_down)]


def _delayed(state):
    return [Walk(f"indexed by bg_delayed where state < {QUEUED} and state = {state}",
                 ("run_at", "id"))]


_CLAIMS = ("priority", "place", "id")
_READY = [
    Walk(f"indexed by bg_ready where state = {QUEUED} and alone = 0", _CLAIMS),
    Walk(f"indexed by bg_alone where state = {QUEUED} and alone <> 0", _CLAIMS),
]
_GROUP = Walk(f"""indexed by bg_group where state = {QUEUED} and alone = 0
    and queue = :group_queue and name = :group_name""", _CLAIMS)
_ALL = [Walk("where 1", ("id",), is_down=True)]
_WALKS: dict[int | None, list[Walk]] = {
    SCHEDULED: _delayed(SCHEDULED), RETRYING: _delayed(RETRYING), QUEUED: _READY,
    RUNNING: [Walk(f"indexed by bg_running where state = {RUNNING}", ("id",), True)],
    FAILED: _bad(FAILED, True), CANCELLED: _bad(CANCELLED, True),
}
_OLDEST_FIRST: dict[int | None, list[Walk]] = {
    FAILED: _bad(FAILED, False), CANCELLED: _bad(CANCELLED, False),
}


def _pattern(text):
    return "%" + re.sub("[!%_]", r"!\g<0>", text) + "%"


def _values(filter, max_id=None):
    """Of the parameters of _FITS."""
    if len(filter.text or "") > _LONGEST_TEXT:
        raise OptionError(f"a text to look for has at most {_LONGEST_TEXT} characters")
    values = {**filter._asdict(), "max_id": max_id, "coded": None}
    for key in ("text", "error"):
        if values[key] is not None:
            coded = _pattern(to_json(values[key])[1:-1])
            values[key] = coded if key == "error" else _pattern(values[key])
            values["coded"] = coded if key == "text" else values["coded"]
    return values


def _numbered(letter, place):
    return {f"{letter}{n}": value for n, value in enumerate(place)}


def has_text(text: str, row: TaskRow, args: str, error: dict | None) -> bool:
    """True when a task has the text in its name, its call or its error."""
    found = (row.name, args, str(TaskError(error)) if error else "")
    coded = to_json(text)[1:-1].lower()
    return any(t in part.lower() for t in (text.lower(), coded) for part in found)


class Search:
    """Goes through the tasks of a filter in their order, from a place on."""

    def __init__(self, lists: Lists, filter: Filter, place: tuple | None = None,
                 max_id: int | None = None, is_oldest_first: bool = False,
                 match: Callable | None = None):
        self._lists, self._filter = lists, filter
        self._match = match or functools.partial(has_text, filter.text or "")
        walks = is_oldest_first and _OLDEST_FIRST.get(filter.state)
        walks = walks or _WALKS.get(filter.state, _ALL)
        values = _values(filter, max_id)
        self._walks = [(walk, values) for walk in walks]
        self.is_down = walks[0].is_down
        self.place = place or walks[0].first    # what is not seen yet; None: nothing
        looks = filter._replace(state=None)
        if filter.state == QUEUED and (filter.name, filter.queue) != (None, None):
            groups = self._groups()
            if len(groups) <= _MOST_GROUPS:
                self._walks = [(_GROUP, {**values, **group}) for group in groups]
                self._walks.append((_READY[1], values))
                looks = looks._replace(name=None, queue=None)
        self._looks = looks != Filter()         # it may pass many that do not fit

    def _groups(self):
        """The (queue, name) groups of what is ready that fit, and some if too many."""
        f = self._filter
        every = self._lists.waiting_names(10 * _MOST_GROUPS)
        if len(every) == 10 * _MOST_GROUPS:
            return every
        return [{"group_queue": queue, "group_name": name} for queue, name in every
                if f.queue in (None, queue) and f.name in (None, name)]

    def step(self, most: int) -> list[tuple]:
        """(place, task) of the next, `most` at most; fewer do not mean the end."""
        found: list[tuple] = []
        end = self._end()
        for walk, values in self._walks:
            size, until = len(walk.keys), end or walk.last
            rows = self._lists.db.read(walk.rows, self._between(values, until, most))
            found += [(row[:size], TaskRow(*row[size:])) for row in rows]
        found.sort(key=operator.itemgetter(0), reverse=self.is_down)
        del found[most:]
        self.place = found[-1][0] if len(found) == most else end
        return found

    def _between(self, values, until, most):
        return {**values, **_numbered("a", self.place), **_numbered("b", until),
                "most": most}

    def _end(self):
        """Up to where a step may go; None: to the end."""
        if not self._looks:
            return None
        ends = [row for walk, values in self._walks for row in self._lists.db.read(
            walk.window, {**values, **_numbered("a", self.place)})]
        return sorted(ends, reverse=self.is_down)[0] if ends else None

    def number(self, at_most: int) -> int:
        """How many fit in the next step, without a look at any, `at_most` at most."""
        end, found = self._end(), 0
        for walk, values in self._walks:
            until = end or walk.last
            found += self._lists.db.read(
                walk.number, self._between(values, until, at_most - found))[0][0]
        self.place = end
        return found

    @property
    def needs_look(self) -> bool:
        """True when SQL alone cannot say which fit."""
        return self._filter.text is not None or self._filter.error is not None

    def fits(self, row: TaskRow) -> bool:
        """True unless SQL was too generous."""
        if not self.needs_look:
            return True
        f = self._filter
        try:
            error = self._lists.error(row.id)
            if f.error is not None and (
                    error is None or f.error not in (error.get("type"), error["kind"])):
                return False
            return f.text is None or \
                self._match(row, self._lists.args(row.id) or "", error)
        except TaskNotFound:                    # deleted a moment ago
            return False


def said_place(place):
    """A place as text: its own texts are found again by the id, which comes last."""
    return "~".join(str(value) for value in place if not isinstance(value, str))


def _place_of(text):
    """The numbers in what a page said of where to go on.  Raises OptionError."""
    numbers = str(text).split("~")
    if not all(re.fullmatch(r"-?\d{1,18}(\.\d{1,18})?", number) for number in numbers):
        raise OptionError(_NO_PAGE.format(text))
    return [float(number) if "." in number else int(number) for number in numbers]


class Lists(Records):
    """What can be read of many tasks."""

    def page(self, filter: Filter, before: str | int | None = None, limit: int = 50,
             seconds: float = 0.15, match: Callable | None = None,
             clock: Callable[[], float] = time.monotonic) -> Page:
        search = Search(self, filter, self.start(filter.state, before), match=match)
        return self._page(search, limit, clock() + seconds, clock)

    def _page(self, search, limit, deadline, clock):
        rows: list[TaskRow] = []
        while search.place is not None and len(rows) < limit:
            for place, row in search.step(limit - len(rows)):
                if search.fits(row):
                    rows.append(row)
                if search.needs_look and clock() >= deadline:
                    search.place = place
                    break
            if clock() >= deadline:
                break
        if search.place is None:
            return Page(rows, None)
        return Page(rows, said_place(search.place), *self._seen(search.place[-1]))

    def _seen(self, task_id):
        """(id of a task, when it was touched last)."""
        rows = self.db.read(f"""select {_TOUCHED} from bg_task where id = :id""",
                            {"id": task_id})
        return task_id, rows[0][0] if rows else None

    def start(self, state, before):
        """The place that a page, or the id of a task, stands for."""
        if before is None:
            return None
        numbers, walk = _place_of(before), _WALKS.get(state, _ALL)[0]
        task_id, is_bad = numbers[-1], state in _OLDEST_FIRST
        size = 2 if is_bad else len(walk.keys)
        if len(numbers) == size and not is_bad:
            return tuple(numbers)
        rows = self.db.read(
            """select ifnull(finished_at, 0), name, queue, id, run_at, priority, place
                from bg_task where id = :id""", {"id": task_id})
        if len(numbers) == size:                # the order among those of one moment
            return (numbers[0], *(rows[0][1:3] if rows else (_HIGHEST,) * 2), task_id)
        if not rows or len(numbers) > 1:
            raise OptionError(_NO_PAGE.format(before))
        at, name, queue, _, run_at, *order = rows[0]
        return (at, name, queue, task_id) if is_bad else (run_at, task_id) \
            if size == 2 else (*order, task_id)

    def count(self, filter: Filter, max_id: int | None = None,
              at_most: int | None = None, seconds: float | None = None) -> int:
        search, found = Search(self, filter, max_id=max_id), 0
        most = _FAR if at_most is None else at_most
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        while search.place is not None and found < most:
            if search.needs_look:
                found += sum(search.fits(row) for _, row in search.step(BATCH))
            else:
                found += search.number(most - found)
            if time.monotonic() >= deadline:
                break
        return min(found, most)

    def tasks(self, state: int | None = None, name: str | None = None,
              queue: str | None = None, limit: int = 50) -> list[TaskRow]:
        found = self.page(Filter(state, name, queue), limit=limit, seconds=math.inf)
        return sorted(found.rows, reverse=True)

    def arrivals(self, now: int, most: int = 10_000) -> dict[str, float]:
        for limit in (min(_FEW_NEWEST, most), most):
            # created_at is that of the row with the lowest id: so SQLite has it.
            rows = self.db.read(
                """select queue, sum(created_at between :since and :now
                            and run_at <= :now), count(*), min(id), created_at
                    from (select id, queue, created_at, run_at from bg_task
                        order by id desc limit :limit)
                    group by queue""",
                {"since": now - 60_000, "now": now, "limit": limit})
            first = min(rows, key=operator.itemgetter(3), default=(0,) * 5)
            if sum(row[2] for row in rows) < limit or first[4] < now - 60_000:
                return {row[0]: float(row[1]) for row in rows if row[1]}
        pace = 60_000 / max(1, now - first[4])
        return {row[0]: row[1] * pace for row in rows if row[1]}

    def failures(self, since: int, limit: int = 1000) -> list[FailureRow]:
        rows = self.db.read(
            f"""select t.id, t.name, t.queue, t.finished_at, p.body
                from bg_task as t indexed by bg_bad
                    left join bg_payload as p on p.id = t.id * 8 + {ERROR}
                where t.state = {FAILED} and t.state > {SUCCESS}
                    and t.finished_at >= :since
                order by t.finished_at desc, t.name desc, t.queue desc, t.id desc
                limit :limit""",
            {"since": since, "limit": limit})
        return [FailureRow(*row, *self._error_parts(body)) for *row, body in rows]

    def _error_parts(self, body):
        error = read_error(body) or {"kind": "exception"}
        parts = (error.get(key, "") for key in ("kind", "type", "message"))
        return [str(part)[:_MESSAGE_CHARS] for part in parts]

    def waiting_names(self, limit: int) -> list[tuple[str, str]]:
        found = self.db.read(_READY_GROUPS, {"limit": limit})
        found += self.db.read(
            f"""select distinct queue, name from bg_task indexed by bg_alone
                where state = {QUEUED} and alone <> 0""")
        return sorted(set(found))[:limit]

    def indexed_counts(self) -> list[tuple[str, str, int, int]]:
        return self.db.read(_COUNTS)

    def queues(self, now: int) -> list[QueueRow]:
        found: dict[str, dict] = {
            name: {"paused_at": at, "paused_by": by, "reason": reason}
            for name, at, by, reason in self.db.read(
                """select name, paused_at, paused_by, reason from bg_queue""")
        }
        for queue, state, number, first, later in self.db.read(_BY_QUEUE, {"now": now}):
            row = found.setdefault(queue, {})
            row[STATE_NAMES[state]] = row.get(STATE_NAMES[state], 0) + number
            if state < QUEUED:
                row["next_at"] = earliest(row.get("next_at"), later)
            if first is not None and (state == QUEUED or first <= now):
                row["oldest_at"] = earliest(row.get("oldest_at"), first)
        for queue, first in self.db.read(_HEADS):
            row = found[queue]
            row["oldest_at"] = earliest(row.get("oldest_at"), first)
        return [QueueRow(name, **found[name]) for name in sorted(found)]

    def events(self, before: int | None = None, limit: int = 50) -> list[EventRow]:
        rows = self.db.read(
            """select id, at, who, how, action, target, detail from bg_event
                where :before is null or id < :before order by id desc limit :limit""",
            {"before": before, "limit": limit})
        return [EventRow(*row) for row in rows]


# == Desk =====================================================================
# Owns the SQL of what people do to tasks and queues, be it by a command, a page or an
# AsyncResult; and the events, in which it is written down who did it.

_KEPT_EVENTS = 10_000
_SEPARATE_IDS = 20          # tasks that have an event each when done to by their ids
_TARGET_CHARS = 1000        # of an event's target
_MOST_LEFT = 10_000         # that are counted of what is left to be done
_SHARE = (math.sqrt(5) - 1) / 2     # times an id, modulo 1: spread evenly
# What each action of act() is about, where a filter does not say.
ABOUT = {
    "retry": (FAILED,), "cancel": (SCHEDULED, RETRYING, QUEUED),
    "forget": (SUCCESS, FAILED, CANCELLED), "run_now": (SCHEDULED, RETRYING),
}


class Doing:
    """What is done to single tasks, in one transaction, by the name of the action.

    Each of these returns why it cannot be done to a task; nothing where it is done.
    """

    def __init__(self, link: Link, now: int, spread: float = 0.0):
        self._link, self._by, self._now = link, link.connection, now
        self._spread = to_ms(spread)
        self._behind: list[int] = []        # ids that are to be queued behind others
        self._doomed: list[int] = []        # … to be deleted

    def retry(self, task_id: int, state: int) -> str:
        if state in LATER:
            return self.run_now(task_id, state)
        if state not in FINISHED:
            return f"is {state_name(state)}"
        key, = self._by.execute(
            """select key from bg_task where id = :id""", {"id": task_id}).fetchone()
        if key_holder(self._by, key):
            return KEY_HELD
        keep_last(self._by, task_id)
        self._by.execute(
            f"""update bg_task set state = {SCHEDULED}, forgiven = attempt,
                    alone = 0, cancel_asked = 0, run_at = :at, counted = 0,
                    started_at = null, finished_at = null, duration = null,
                    result = null,
                    place = (select value from bg_meta where name = 'place')
                where id = :id""",
            {"id": task_id, "at": self._due(task_id)},
        )
        self._by.execute(
            """delete from bg_payload where id > :args and id < :mark""",
            {"args": task_id * 8 + ARGS, "mark": task_id * 8 + MARK},
        )
        if not self._spread:
            self._behind.append(task_id)
        self._link.wake = self._link.wake or wake_addresses(self._by)
        return ""

    def run_now(self, task_id: int, state: int) -> str:
        if state not in LATER:
            return f"is {state_name(state)}"
        self._by.execute(
            """update bg_task set run_at = :at, counted = 0 where id = :id""",
            {"id": task_id, "at": self._due(task_id)},
        )
        if not self._spread and state == RETRYING:
            self._behind.append(task_id)
        elif not self._spread:
            self._by.execute(
                f"""update bg_task set state = {QUEUED} where id = :id""",
                {"id": task_id})
        self._link.wake = self._link.wake or wake_addresses(self._by)
        return ""

    def _due(self, task_id):
        """Evenly over the spread, whatever ids there are and how many at a time."""
        return self._now + int(task_id * _SHARE % 1 * self._spread)

    def cancel(self, task_id: int, state: int) -> str:
        if state in WAITING:
            self._by.execute(
                f"""update bg_task set state = {CANCELLED}, finished_at = :now
                    where id = :id""",
                {"id": task_id, "now": self._now},
            )
        elif state == RUNNING:
            self._by.execute(
                """update bg_task set cancel_asked = 1 where id = :id""",
                {"id": task_id},
            )
            self._link.wake = self._link.wake or wake_addresses(self._by)
        else:
            return f"is {state_name(state)}"
        return ""

    def forget(self, task_id: int, state: int) -> str:
        if state == RUNNING:
            return "is running"
        self._doomed.append(task_id)
        return ""

    def end(self) -> None:
        """What is done for all of them at once."""
        if self._behind:
            queue_behind(self._by, self._behind)
            self._link.wake = self._link.wake or wake_addresses(self._by)
        if self._doomed:
            delete_tasks(self._by, self._doomed)


def delete_tasks(connection, ids):
    """Delete tasks and their payloads; remember the highest id ever given."""
    connection.execute(
        """update bg_meta set value = max(value, :last) where name = 'last_id'""",
        {"last": max(ids)},
    )
    connection.executemany(
        """delete from bg_task where id = ?""", [(task_id,) for task_id in ids])
    connection.executemany(
        """delete from bg_payload where id >= ? and id < ?""",
        [(task_id * 8, task_id * 8 + 8) for task_id in ids])


def note(connection, by, action, target, detail, now):
    """Write down who did what.  An equal event of the same moment is counted up.

    `detail` is a number of tasks, or a text.
    """
    if by is None:
        return
    target = target if len(target) <= _TARGET_CHARS else target[:_TARGET_CHARS] + " …"
    values = {"now": now, "who": str(by.who), "how": by.how, "action": action,
              "target": target, "detail": detail}
    if isinstance(detail, int):
        values["detail"] = f"{detail:d} tasks"
        if connection.execute(
            """update bg_event set detail = (detail + 0 + :more) || ' tasks'
                where id = (select max(id) from bg_event) and at = :now and who = :who
                    and how = :how and action = :action and target = :target""",
            {**values, "more": detail},
        ).rowcount:
            return
    event = connection.execute(
        """insert into bg_event (at, who, how, action, target, detail)
            values (:now, :who, :how, :action, :target, :detail)""", values,
    ).lastrowid
    connection.execute("""delete from bg_event where id <= :old""",
                       {"old": event - _KEPT_EVENTS})


class Desk(Lists):
    """What people can do to tasks and queues."""

    now: Callable[[], int]

    def cancel(self, task_id: int, now: int, by: By | None = None) -> int:
        with self.db.write() as link:
            state = self.state(task_id)
            if not Doing(link, now).cancel(task_id, state):
                note(link.connection, by, "cancel", str(task_id), None, now)
            return state

    def retry(self, task_id: int, now: int, by: By | None = None) -> None:
        with self.db.write() as link:
            state = self.state(task_id)
            if state not in FINISHED:
                raise TaskStateError(
                    f"task {task_id} is {state_name(state)}: only a finished one "
                    "can be retried"
                )
            doing = Doing(link, now)
            why = doing.retry(task_id, state)
            if why:
                raise TaskStateError(f"task {task_id}: {why}")
            doing.end()
            note(link.connection, by, "retry", str(task_id), None, now)

    def forget_schedule(self, row: ScheduleRow, by: By | None = None) -> bool:
        with self.db.write() as link:
            is_there = link.connection.execute(
                """delete from bg_schedule where task = :task and expr = :expr
                    and tz = :tz and number = :number and seen_at = :seen_at""",
                {"task": row.task, "expr": row.expr, "tz": row.tz,
                 "number": row.number, "seen_at": row.seen_at},
            ).rowcount > 0
            if is_there:
                note(link.connection, by, "forget-schedule", row.name,
                     f"{row.expr} {row.tz}", self.now())
            return is_there

    def forget(self, task_id: int, by: By | None = None) -> None:
        with self.db.write() as link:
            if self.state(task_id) == RUNNING:
                raise TaskStateError(f"task {task_id} is running: cancel it first")
            delete_tasks(link.connection, [task_id])
            note(link.connection, by, "forget", str(task_id), None, self.now())

    def act(self, action: str, what: Filter | Sequence[int], now: int,
            by: By | None = None, max_id: int | None = None, spread: float = 0.0,
            limit: int = BATCH, after: str | None = None,
            match: Callable | None = None) -> Acted:
        if action not in ABOUT:
            raise OptionError(f"nothing is called {action!r}; there are "
                              f"{', '.join(sorted(ABOUT))}")
        if not 0 <= spread <= LONGEST_SECONDS:
            raise OptionError(f"spread {spread!r}: seconds from 0 up")
        if not isinstance(what, Filter):
            return self._act_on_ids(action, [row_id(n) for n in what], now, by, spread,
                                    limit, after)
        states = ABOUT[action] if what.state is None else (what.state,)
        if len(states) == 1:
            what = what._replace(state=states[0])
        nth, _, before = (after or "0!").partition("!")
        reasons: collections.Counter = collections.Counter()
        done, n = 0, int(nth) if nth in ("0", "1", "2") else len(states)
        while n < len(states) and not done:
            of = what._replace(state=states[n])
            place = self.start(of.state, before) if before else None
            search = Search(self, of, place, max_id, True, match)
            while search.place is not None and not done:
                ids = [row.id for _, row in search.step(limit) if search.fits(row)]
                done = self._change(action, ids, now, by, str(what), spread, reasons,
                                    of.state)
            before = "" if search.place is None else said_place(search.place)
            n += not before
        skipped = sum(reasons.values())
        if n == len(states):
            return Acted(done, skipped, 0, None, dict(reasons))
        left = sum(self.count(what._replace(state=state), max_id, _MOST_LEFT, 0.1)
                   for state in states[n:]) - skipped
        return Acted(done, skipped, max(left, 1), f"{n}!{before}", dict(reasons))

    def _act_on_ids(self, action, ids, now, by, spread, limit, after):
        first = int(after or 0)
        part, rest = ids[first : first + limit], ids[first + limit:]
        target = None if len(ids) <= _SEPARATE_IDS else ", ".join(map(str, part))
        reasons: collections.Counter = collections.Counter()
        done = self._change(action, part, now, by, target, spread, reasons)
        return Acted(done, sum(reasons.values()), len(rest),
                     str(first + limit) if rest else None, dict(reasons))

    def _change(self, action, ids, now, by, target, spread, reasons, state=None):
        """Do it to those of the ids that are, still, in that state, if one is given.

        They were found before the write lock was held.  Returns how many it was done
        to; why not to the others goes to `reasons`.
        """
        if not ids:
            return 0
        done = []
        with self.db.write() as link:
            doing = Doing(link, now, spread)
            for task_id in ids:
                row = link.connection.execute(
                    """select state from bg_task where id = :id""", {"id": task_id}
                ).fetchone()
                if row is None:
                    why = "is gone"
                elif state is not None and row[0] != state:
                    why = f"is {state_name(row[0])}"
                else:
                    why = getattr(doing, action)(task_id, row[0])
                if why:
                    reasons[why] += 1
                else:
                    done.append(task_id)
            doing.end()
            if target is not None and done:
                note(link.connection, by, action, target, len(done), now)
            for task_id in done if target is None else ():
                note(link.connection, by, action, str(task_id), None, now)
        self.db.checkpoint_if_large()
        return len(done)

    def purge(self, queue: str | None, name: str | None, now: int,
              by: By | None = None) -> int:
        done, acted = 0, Acted(0, 0, 1)
        while acted.left:
            acted = self.act("cancel", Filter(None, name, queue), now, by,
                             after=acted.next)
            done += acted.done
        return done

    def prune(self, cursor: int, before: int | None, failed_before: int | None,
              batch: int, by: By | None = None, now: int = 0) -> tuple[int, int]:
        limits = {SUCCESS: before, CANCELLED: before, FAILED: failed_before}

        def look():
            rows = self.db.read(
                """select id, state, finished_at from bg_task where id > :cursor
                    order by id limit :batch""",
                {"cursor": cursor, "batch": batch},
            )
            ids = [
                task_id for task_id, state, at in rows if at is not None
                and limits.get(state) is not None and at < limits[state]
            ]
            return ids, rows[-1][0] if len(rows) == batch else 0

        old, after = look()
        if old:
            with self.db.write(durable=False, patience=0.5) as link:
                old, after = look()     # again: a retry may have come in between
                if old:
                    delete_tasks(link.connection, old)
                    note(link.connection, by, "prune", "what has finished", len(old),
                         now)
        return len(old), after

    def pause(self, queue: str, now: int, by: By | None = None,
              reason: str | None = None) -> None:
        with self.db.write() as link:
            link.wake = wake_addresses(link.connection)
            link.connection.execute(
                """insert into bg_queue (name, paused_at, paused_by, reason)
                    values (:name, :now, :who, :reason)
                    on conflict (name) do update set
                        reason = ifnull(excluded.reason, reason)""",
                {"name": queue, "now": now, "who": by and by.who, "reason": reason},
            )
            note(link.connection, by, "pause", queue, reason, now)

    def resume(self, queue: str, by: By | None = None) -> bool:
        with self.db.write() as link:
            link.wake = wake_addresses(link.connection)
            was_paused = link.connection.execute(
                """delete from bg_queue where name = :name""", {"name": queue}
            ).rowcount > 0
            if was_paused:
                note(link.connection, by, "resume", queue, None, self.now())
            return was_paused

    def note_event(self, by: By, action: str, target: str, detail: str | None,
                   now: int) -> None:
        with self.db.write() as link:
            note(link.connection, by, action, target, detail, now)


# == Timetable ================================================================
# Owns the SQL of schedules, of the clock, and of what shall happen once in a while.

_FIRST = "on:first "        # begins a row of bg_rate that is no rate: see is_first()


class Timetable:
    """The verbs of workers about time."""

    db: Database

    def is_first(self, what: str, ms: int, now: int) -> bool:
        names = {"name": _FIRST + what, "first": _FIRST, "beyond": _FIRST[:-1] + "!",
                 "now": now, "until": now + ms}
        with self.db.write(durable=False) as link:
            link.connection.execute(
                """delete from bg_rate
                    where name > :first and name < :beyond and tat <= :now""", names)
            return link.connection.execute(
                """insert into bg_rate (name, tat) values (:name, :until)
                    on conflict (name) do nothing""", names,
            ).rowcount == 1

    def clock(self) -> ClockView | None:
        found = dict(self.db.read("""select name, value from bg_meta"""))
        if "clock" not in found:
            return None
        return ClockView(found["clock"], found.get("clock_doubted"))

    def put_clock(self, view: ClockView) -> None:
        names = {"clock": view.seen, "clock_doubted": view.doubted}
        with self.db.write(durable=False, patience=0.5) as link:
            link.connection.execute(
                """delete from bg_meta where name in ('clock', 'clock_doubted')"""
            )
            link.connection.executemany(
                """insert into bg_meta (name, value) values (?, ?)""",
                [item for item in names.items() if item[1] is not None],
            )

    def shorten_waits(self, now: int, batch: int) -> int:
        soon = now + LATE_TURN_MS
        rows = self.db.read(
            f"""select id, run_at, began from (
                    select id, run_at, case state when {SCHEDULED} then created_at else
                        started_at + cast(ifnull(duration, 0) * 1000 as integer)
                        end as began
                    from bg_task where state < {QUEUED} and run_at > :soon
                        and (state = {RETRYING} or counted))
                where began > :soon limit :batch""",
            {"soon": soon, "batch": batch},
        )
        if rows:
            with self.db.write(patience=0.5) as link:
                link.connection.executemany(
                    f"""update bg_task set run_at = max(0, run_at - :ahead),
                            started_at = max(0, started_at - :ahead),
                            created_at = min(created_at, :now)
                        where id = :id and state < {QUEUED} and run_at = :run_at""",
                    [{"id": task_id, "run_at": run_at, "now": now, "ahead": began - now}
                     for task_id, run_at, began in rows],
                )
        return len(rows)

    _SCHEDULES = """
        select task, expr, tz, number, misfire, overlap, jitter, next_tick, last_tick,
            done, set_at, seen_at, last_id, success_at, alert_after, since
        from bg_schedule """

    def schedules(self) -> list[ScheduleRow]:
        rows = self.db.read(self._SCHEDULES + "order by task, expr, tz, number")
        return [ScheduleRow(*row) for row in rows]

    def due_schedules(self, now: int) -> list[ScheduleRow]:
        # Two looks, each by its index: of an `or` SQLite may read the whole table.
        rows = self.db.read(
            f"""{self._SCHEDULES} where next_tick <= :tick
                union {self._SCHEDULES} where set_at > :ahead""",
            {"tick": now // 1000, "ahead": now + AHEAD_MS},
        )
        found = [ScheduleRow(*row) for row in rows]     # in SQL, order reads them all
        return sorted(found, key=lambda row: (row.next_tick or 0, row))

    def next_tick(self, now: int) -> int | None:
        return self.db.read(
            """select min(next_tick) from bg_schedule where next_tick > :tick""",
            {"tick": now // 1000},
        )[0][0]

    def put_schedules(self, rows: Sequence[ScheduleRow], drop: bool = True) -> None:
        with self.db.write() as link:
            link.connection.executemany(
                self._PUT_SCHEDULE,
                [(*row[:12], row.alert_after, row.seen_at) for row in rows])
            link.connection.executemany(
                """delete from bg_schedule where task = :task
                    and seen_at < :before
                    and (next_tick is null or next_tick < :before / 1000)""",
                [{"task": row.task, "before": row.seen_at - DAY_MS}
                 for row in rows if drop],
            )

    _PUT_SCHEDULE = """
        insert into bg_schedule (task, expr, tz, number, misfire, overlap, jitter,
            next_tick, last_tick, done, set_at, seen_at, alert_after, since)
        values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
        on conflict (task, expr, tz, number) do update set misfire = excluded.misfire,
            overlap = excluded.overlap, jitter = excluded.jitter,
            alert_after = excluded.alert_after, since = ifnull(since, excluded.since),
            seen_at = excluded.seen_at, next_tick = case done when excluded.done
                then excluded.next_tick else next_tick end"""

    def fire(self, steps: Sequence[ScheduleStep],
             patience: float | None = None) -> list[list[int] | None]:
        with self.db.write(patience=patience) as link:
            requests = [self._fire_one(link.connection, step) for step in steps]
            if any(requests):
                insert_all(link, [r for found in requests for r in found or ()])
                link.connection.executemany(
                    """update bg_schedule set last_id = ?
                        where task = ? and expr = ? and tz = ? and number = ?""",
                    [(found[-1].ids[0], *step.row[:4])
                     for step, found in zip(steps, requests) if found],
                )
        return [None if found is None else [r.ids[0] for r in found]
                for found in requests]

    def _fire_one(self, connection, step):
        old, new, runs = step
        if runs and runs[0].key is not None:
            held = key_holder(connection, runs[0].key) is not None
            runs = [] if held else runs[:1]
        moved = connection.execute(
            """update bg_schedule set next_tick = :next_tick, last_tick = :last_tick,
                    done = :done, set_at = :set_at
                where task = :task and expr = :expr and tz = :tz and number = :number
                    and done = :old_done and set_at = :old_set_at""",
            {
                "next_tick": new.next_tick, "done": new.done, "set_at": new.set_at,
                "last_tick": runs[-1].tick if runs else old.last_tick,
                "task": old.task, "expr": old.expr, "tz": old.tz,
                "number": old.number, "old_done": old.done, "old_set_at": old.set_at,
            },
        ).rowcount
        return [Request(run, ["[[],{}]"]) for run in runs] if moved else None


# == Facts ====================================================================
# Owns the SQL of `why`, and of what needs attention: whatever tells of it, read in one
# transaction.  What may be large is found by seeks, or counted up to a limit; no
# statement reads finished tasks.  Judges nothing: see the room Why.

_MOST_WORKERS = 1000        # those that beat last
_MOST_KNOWN = 20_000        # that workers know
_MOST_HEADS = 1000          # groups that are looked at
_MOST_RUNNING = 10_000      # runs that are counted by their workers
_MOST_DUE = 100_000         # due tasks, and waiting ones of a paused queue
_MOST_FEW = 1000            # of queues, schedules, children
_MOST_LONG = 20             # long runs, and names whose errors are looked at
_MOST_ERRORS = 50           # … and of each of these
_MOST_NEWEST = 10_000       # tasks by which is told how many come
_PACE_MS = 300_000          # for how long a pace is looked at
_LONG_MS = 60_000           # a run that takes longer may be a stuck one
_LATELY_MS = 600_000        # what fails lately


def _sums(kind):
    """SQL for the counts of one kind in bg_history, summed."""
    return ", ".join(f"ifnull(sum({kind}{n}), 0)"
                     for n in range(len(HISTORY_BOUNDS) + 1))


class Looks(Records, Attempts):
    """What both verbs read.  They are called within one_moment()."""

    def _workers(self, name=""):
        """Those registered; with what they know of a task."""
        rows = self.db.read(
            f"{WORKER_ROW} order by beat_at desc limit {_MOST_WORKERS}")
        holding = {worker: rest for worker, *rest in self._held()}
        known = self._known()
        names: dict[int, dict] = collections.defaultdict(dict)
        for worker, task, *limits in known:
            names[worker][task] = limits
        is_whole = len(known) < _MOST_KNOWN
        if not is_whole:            # those of the last one may be incomplete
            names.pop(known[-1][0])
        found = []
        for row in rows:
            worker, told = WorkerRow(*row), names.get(row[0])
            if told is None and worker.state is not None and is_whole:
                told = {}
            rate, most = (told or {}).get(name, (None, None))
            known_names = None if told is None else frozenset(told)
            held = holding.get(worker.id, (0, None))
            found.append(WorkerFacts(*(worker, *held, known_names, rate, most)))
        return tuple(found)

    def _held(self):
        """(worker, runs it has, when it claimed the last)."""
        return self.db.read(
            f"""select worker, count(*), max(started_at) from (
                select worker, started_at from bg_task indexed by bg_running
                    where state = {RUNNING} limit {_MOST_RUNNING})
                group by worker""")

    def _known(self):
        return self.db.read(
            f"""select worker, name, rate, max_running from bg_worker_task
                order by worker desc limit {_MOST_KNOWN}""")

    def _pauses(self):
        rows = self.db.read(
            f"""select name, paused_at, paused_by, reason from bg_queue
                order by name limit {_MOST_FEW}""")
        return tuple(Pause(*row) for row in rows)
    def _left(self, workers):
        """The end of the last worker, if there is no other."""
        rows = [] if workers else self.db.read(
            """select at, who, how, action, detail from bg_event
                where action = 'worker_stop' order by id desc limit 1""")
        return Act(*rows[0]) if rows else None

    def _heads(self):
        """The first ready task of each queue, name and priority, by a leap for each.

        Its `run_at` is the earliest of the few that stand there: what was put off came
        in earlier than it became due.
        """
        rows = self.db.read(
            f"""with recursive head (id) as (
                    select (select id from bg_task indexed by bg_group
                        where state = {QUEUED} and alone = 0
                        order by queue, name, priority, place, id limit 1)
                    union all
                    select coalesce(
                        (select id from bg_task as t indexed by bg_group
                            where t.state = {QUEUED} and t.alone = 0
                                and t.queue = h.queue and t.name = h.name
                                and t.priority > h.priority
                            order by t.priority, t.place, t.id limit 1),
                        (select id from bg_task as t indexed by bg_group
                            where t.state = {QUEUED} and t.alone = 0
                                and t.queue = h.queue and t.name > h.name
                            order by t.name, t.priority, t.place, t.id limit 1),
                        (select id from bg_task as t indexed by bg_group
                            where t.state = {QUEUED} and t.alone = 0
                                and t.queue > h.queue
                            order by t.queue, t.name, t.priority, t.place, t.id
                            limit 1))
                        from head join bg_task as h on h.id = head.id
                    limit {_MOST_HEADS})
                select h.id, h.queue, h.name, h.priority, (select min(run_at) from (
                        select t.run_at from bg_task as t indexed by bg_group
                            where t.state = {QUEUED} and t.alone = 0
                                and t.queue = h.queue and t.name = h.name
                                and t.priority = h.priority
                            order by t.place, t.id limit 8))
                    from head join bg_task as h on h.id = head.id""")
        return [Head(*row) for row in rows]

    def _slots(self, now):
        """[(span, its starts)] that make up the last day."""
        rolled = self.db.read("""select value from bg_meta where name = 'rolled_to'""")
        now_s = now // 1000
        rolled_to = int(rolled[0][0]) if rolled else 0
        newest = min(now_s, max(now_s - 10_800, rolled_to)) // 60 * 60
        quarters = range((now_s - 86_400) // 900 * 900, newest, 900)
        return (900, [*quarters]), (60, [*range(newest, now_s + 1, 60)])

    def _counts(self, kind, name, now):
        """Counts, by HISTORY_BOUNDS, of the runs of a task in the last day."""
        total: tuple = ()
        for span, starts in self._slots(now):
            counts = self.db.read(
                f"""select {_sums(kind)} from json_each(:starts) as slot
                    cross join bg_history where span = :span and at = slot.value
                        and name = :name""",
                {"starts": json.dumps(starts), "span": span, "name": name})[0]
            total = tuple(map(sum, zip(total, counts))) if total else counts
        return total


class TaskLook(Looks):
    """What tells of one task."""

    def task_facts(self, task_id: int, now: int) -> TaskFacts:
        with one_moment(self.db):
            facts = TaskFacts(row_id(task_id), now, self._last_id(),
                              batch=PROMOTE_BATCH)
            try:
                task = self.task(task_id)
            except TaskNotFound:
                return facts._replace(act=self._act_on(task_id, "forget"))
            facts = facts._replace(
                task=task, error=read_error(self._text(task_id, ERROR)),
                attempts=tuple(self.attempts(task_id)),
                workers=self._workers(task.name))
            if task.state in FINISHED:
                return facts._replace(act=self._act_on(task_id, "cancel", task),
                                      holder=self._holder(task))
            facts = facts._replace(left=self._left(facts.workers),
                                   ran=self._counts("r", task.name, now))
            if task.state == RUNNING:
                return facts._replace(
                    act=self._act_on(task_id, "cancel"), run=self._in_hand(task_id),
                    progress=self._list(task_id, PROGRESS) or None)
            return self._waiting_facts(facts)

    def _waiting_facts(self, facts):
        task, now, workers = facts.task, facts.now, facts.workers
        knows = [w.names is None or task.name in w.names for w in workers]
        pause = self.db.read(
            """select name, paused_at, paused_by, reason from bg_queue
                where name = :queue""", {"queue": task.queue})
        facts = facts._replace(
            pause=Pause(*pause[0]) if pause else None, pace=self._pace(now),
            tats={n: at for n in (task.name, "") for at in self._tat(n)},
            running=self._running_of(task.name),
            due=self._due(now) if task.state < QUEUED and task.run_at <= now else 0)
        if not any(knows):
            facts = facts._replace(names=self._names(), last_run=self._last_run(task))
        if task.state != QUEUED:
            return facts
        place, alone = self._row(
            """select place, alone from bg_task where id = :id""", task.id)
        ahead, is_more = (), False
        if workers and not alone:       # else it makes no difference
            ahead, is_more = self._ahead(task, place)
        facts = facts._replace(alone=bool(alone), ahead=ahead, is_more=is_more)
        if ahead and ahead[-1].priority < task.priority and not is_more:
            return self._with_recent(facts)
        return facts

    def _last_id(self):
        return self.db.read(
            """select max(ifnull((select value from bg_meta where name = 'last_id'), 0),
                ifnull((select max(id) from bg_task), 0))""")[0][0]

    def _text(self, task_id, kind):
        return payload_of(self.db, task_id, kind)

    def _list(self, task_id, kind):
        """A list that is kept as JSON; empty where it is no list any more."""
        found = None
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(self._text(task_id, kind) or "null")
        return found if isinstance(found, list) else []

    def _act_on(self, task_id, action, task=None):
        """What somebody did: to the task, or to many at the moment of its end."""
        rows = self.db.read(
            """select at, who, how, action, detail from bg_event
                where target = :target and action = :action
                    or at = :at and action in ('cancel', 'purge')
                order by id desc limit 1""",
            {"target": str(task_id), "action": action,
             "at": task.finished_at if task and task.state == CANCELLED else None})
        return Act(*rows[0]) if rows else None

    def _holder(self, task):
        rows = self.db.read(
            f"""select id from bg_task
                where key = :key and key is not null and state < {SUCCESS}""",
            {"key": task.key})
        return rows[0][0] if rows else None

    def _in_hand(self, task_id):
        rows = self.db.read(
            """select r.task, ifnull(t.name, ''), r.worker, r.began_at, r.behind,
                    b.began_at
                from bg_run as r left join bg_task as t on t.id = r.task
                    left join bg_run as b on b.task = r.behind
                where r.task = :id and r.attempt = t.attempt and r.worker = t.worker""",
            {"id": task_id})
        return InHand(*rows[0]) if rows else None

    def _tat(self, limit):
        return [tat for tat, in self.db.read(
            """select tat from bg_rate where name = :name""", {"name": limit})]

    def _running_of(self, name):
        return self.db.read(
            f"""select count(*) from (select name from bg_task indexed by bg_running
                    where state = {RUNNING} limit {_MOST_RUNNING})
                where name = :name""", {"name": name})[0][0]

    def _due(self, now):
        return self.db.read(
            f"""select count(*) from (select 1 from bg_task indexed by bg_delayed
                where state < {QUEUED} and run_at <= :now limit {_MOST_DUE})""",
            {"now": now})[0][0]

    def _names(self):
        return tuple(name for name, in self.db.read(
            f"""select distinct name from
                (select name from bg_worker_task limit {_MOST_KNOWN})"""))

    def _last_run(self, task):
        """When a task of this name ended last, as far as its row is still there."""
        rows = self.db.read(
            """select finished_at from bg_task where id in (
                select max(hi) from bg_history
                    where span = 0 and at = 0 and name = :name)""", {"name": task.name})
        return rows[0][0] if rows else None

    # -- who is before it

    def _ahead(self, task, place):
        """(Ahead of each group in order of priority, there are more)."""
        found, left = [], AHEAD_MOST
        paused = {pause.queue for pause in self._pauses()}
        heads = self._heads()
        for head in sorted(heads, key=lambda head: head.priority):
            if head.priority > task.priority or head.queue in paused:
                continue
            is_before = head.priority < task.priority
            count, = self.db.read(
                f"""select count(*) from (
                    select 1 from bg_task indexed by bg_group
                        where state = {QUEUED} and alone = 0 and queue = :queue
                            and name = :name and priority = :priority
                            and place < :place
                    union all
                    select 1 from bg_task indexed by bg_group
                        where state = {QUEUED} and alone = 0 and queue = :queue
                            and name = :name and priority = :priority
                            and place = :place and id < :id
                    limit :most)""",
                {"queue": head.queue, "name": head.name, "priority": head.priority,
                 "place": MOST_ID if is_before else place, "id": task.id,
                 "most": left})[0]
            left -= count
            if count:
                found.append(Ahead(head.queue, head.name, head.priority, count))
        return tuple(found), left <= 0 or len(heads) == _MOST_HEADS

    def _with_recent(self, facts):
        """How many came of late of those before it, which are all of lower numbers."""
        since = max(0, facts.now - _PACE_MS)
        looked, oldest, count = self.db.read(
            """select count(*), min(created_at), sum(priority < :priority
                    and created_at >= :since
                    and queue in (select value from json_each(:queues)))
                from (select queue, priority, created_at from bg_task
                    order by id desc limit :most)""",
            {"priority": facts.task.priority, "since": since, "most": _MOST_NEWEST,
             "queues": json.dumps([group.queue for group in facts.ahead])})[0]
        if looked == _MOST_NEWEST:
            since = max(since, oldest)
        return facts._replace(recent=count, recent_since=since)

    def _pace(self, now):
        since = (now - _PACE_MS) // 60_000 * 60
        rows = self.db.read(
            f"""select queue, name, sum(runs), min(at) * 1000 from bg_history
                where span = 60 and at >= :since group by queue, name
                limit {_MOST_FEW}""", {"since": since})
        return tuple(Pace(*row) for row in rows)


class SystemLook(Looks):
    """What tells of all."""

    def system_facts(self, now: int) -> SystemFacts:
        with one_moment(self.db):
            workers = self._workers()
            heads = self._heads()
            schedules = self._schedules()
            clock = dict(self.db.read(
                """select name, value from bg_meta
                    where name in ('clock', 'clock_doubted')"""))
            late = {head.queue for head in heads if head.run_at < now - _LONG_MS}
            ids = {worker.row.id for worker in workers}
            return SystemFacts(
                now, bool(schedules) or self._is_work(), workers,
                tuple((n, count) for n, count, _ in self._held() if n not in ids),
                self._left(workers), tuple(map(self._with_waiting, self._pauses())),
                tuple(heads), len(heads) == _MOST_HEADS,
                self._waits(late, now) if late else {}, self._recent(now), schedules,
                self._children(), self._long(now),
                ClockView(clock["clock"], clock.get("clock_doubted"))
                if "clock" in clock else None)

    def _is_work(self):
        return bool(self.db.read(
            f"""select 1 where exists (select 1 from bg_task where state < {QUEUED})
                or exists (select 1 from bg_task where state = {QUEUED} and alone = 0)
                or exists (select 1 from bg_task where state = {QUEUED} and alone <> 0)
                or exists (select 1 from bg_task where state = {RUNNING})"""))

    def _with_waiting(self, pause):
        count = self.db.read(
            f"""select count(*) from (select 1 from bg_task indexed by bg_group
                where state = {QUEUED} and alone = 0 and queue = :queue
                limit {_MOST_DUE})""", {"queue": pause.queue})[0][0]
        return pause._replace(waiting=count)

    def _waits(self, queues, now):
        """Counts of what runs waited in the last day, of these queues."""
        found: dict[str, list] = {}
        for span, starts in self._slots(now):
            rows = self.db.read(
                f"""select queue, {_sums("w")} from bg_history
                    where span = :span and at between :first and :last
                    group by queue""",
                {"span": span, "first": starts[0] if starts else 0,
                 "last": starts[-1] if starts else -1})
            for queue, *counts in rows:
                if queue in queues:
                    before = found.get(queue, [0] * len(counts))
                    found[queue] = [a + b for a, b in zip(before, counts)]
        return found

    def _recent(self, now):
        """Names that had bad ends of late; of some of them what it was."""
        rows = self.db.read(
            f"""select name, sum(runs * (at >= :lately)),
                    sum((failed + retried) * (at >= :lately)), sum(crashed)
                from bg_history where span = 60 and at >= :hour
                group by name having sum(failed + retried + crashed) > 0
                order by 3 desc, 4 desc limit {_MOST_FEW}""",
            {"lately": (now - _LATELY_MS) // 60_000 * 60,
             "hour": (now - HOUR_MS) // 60_000 * 60})
        return tuple(
            Recent(*(*row, self._usual_error(row[0], now) if n < _MOST_LONG else None))
            for n, row in enumerate(rows))

    def _usual_error(self, name, now):
        """The most frequent one of the newest of a name: of what failed, or will be
        run again."""
        rows = self.db.read(
            f"""select body from (
                    select id as task from (
                        select id from bg_task indexed by bg_bad
                            where state > {SUCCESS} and state = {FAILED}
                                and finished_at >= :since and name = :name
                            order by finished_at desc limit {_MOST_ERRORS})
                    union all
                    select id from (
                        select id, name from bg_task indexed by bg_delayed
                            where state < {QUEUED} and state = {RETRYING}
                            order by run_at limit {_MOST_FEW})
                        where name = :name)
                join bg_payload on id = 8 * task + {ERROR} limit {_MOST_ERRORS}""",
            {"name": name, "since": now - HOUR_MS})
        errors = [read_error(body) for body, in rows]
        kinds = collections.Counter(
            (e["kind"], str(e.get("type"))) for e in errors if e)
        usual = kinds.most_common(1)[0][0] if kinds else None
        return next((e for e in errors if e and
                     (e["kind"], str(e.get("type"))) == usual), None)

    def _schedules(self):
        rows = self.db.read(
            f"""select s.task, s.expr, s.tz, s.number, s.misfire, s.overlap, s.jitter,
                    s.next_tick, s.last_tick, s.done, s.set_at, s.seen_at, s.last_id,
                    s.success_at, s.alert_after, s.since, t.state
                from bg_schedule as s left join bg_task as t on t.id = s.last_id
                order by s.next_tick limit {_MOST_FEW}""")
        return tuple(ScheduleFacts(ScheduleRow(*row), state) for *row, state in rows)

    def _children(self):
        rows = self.db.read(
            f"""select worker, pid, memory from bg_child order by memory desc
                limit {_MOST_FEW}""")
        return tuple(ChildFacts(*row) for row in rows)

    def _long(self, now):
        """The longest of the runs that have no limit of their own."""
        rows = self.db.read(
            f"""select r.task, t.name, r.worker, r.began_at, null, null, t.timeout
                from bg_run as r join bg_task as t on t.id = r.task
                where t.state = {RUNNING} and r.attempt = t.attempt
                    and r.began_at < :before and t.timeout is null
                order by r.began_at limit {_MOST_LONG}""", {"before": now - _LONG_MS})
        return tuple(InHand(*(*row, self._counts("r", row[1], now))) for row in rows)


class Facts(TaskLook, SystemLook):
    """The verbs that tell why."""


# == Register =================================================================
# Owns the SQL of workers about each other: who there is, and who is dead.  All verbs
# meet here, in SqliteStore.

class Register:
    """The verbs of workers about each other."""

    db: Database
    now: Callable[[], int]

    def reap(self, worker: int, name: str, now: int, beat_at: int | None = None,
             begun: Container[tuple[int, int]] | None = None) -> list[LostRun]:
        with self.db.write(patience=0.5) as link:
            if beat_at is not None and not self.db.read(
                """select 1 from bg_worker where id = :id and beat_at = :beat_at""",
                {"id": worker, "beat_at": beat_at},
            ):
                return []
            rows = self.db.read(
                f"""select cancel_asked, id, name, queue, attempt - 1, retries,
                        forgiven, timeout, run_at, tick, null, priority, callbacks,
                        alone
                    from bg_task where state = {RUNNING} and worker = :worker""",
                {"worker": worker},
            )
            lost: list[LostRun] = []
            then: list[tuple] = []
            counts = RunCounts()
            for cancel_asked, *values in rows:
                run = Run(*values)
                had_begun = begun is None or (run.id, run.attempt) in begun
                is_over = had_begun and run.is_last
                state = CANCELLED if cancel_asked else FAILED if is_over else QUEUED
                self._lose(link.connection, run.id, state, now, int(not had_begun))
                lost.append(
                    LostRun(run.id, run.name, run.attempt, state, name, had_begun))
                if had_begun:
                    error = {"kind": "lost", "message": f"worker {name} died"}
                    if state == FAILED:
                        error["final"] = "used_up"
                    keep_attempt(link.connection, run, worker, error_head(error),
                                 "retried", name)
                    drop_old(link.connection, run, state)
                    put_payload(link.connection, run.id, ERROR, to_json(error))
                    keep_printed(link.connection, run, worker)
                    then += callback_rows(run, state, error, now, name)
                    counts.add_lost(run, state)
            add_history(link.connection, counts, now)
            if then:
                then = without_crowds(link.connection, then)
                insert_all(link, [Request(row, [text]) for row, text in then])
            take_off(link.connection, worker)
            link.wake = wake_addresses(link.connection)
        return lost

    def _lose(self, connection, task_id, state, now, uncount):
        connection.execute(
            f"""update bg_task set state = :state, cancel_asked = 0,
                    attempt = attempt - :uncount,
                    finished_at = case when :state > {RUNNING} then :now end
                where id = :id""",
            {"id": task_id, "state": state, "now": now, "uncount": uncount},
        )

    def unknown_workers(self) -> list[int]:
        rows = self.db.read(
            f"""select distinct worker from bg_task where state = {RUNNING}
                and worker not in (select id from bg_worker)"""
        )
        return [row[0] for row in rows]

    def remove_worker(self, worker: int, cpu: float | None = None,
                      children_cpu: float | None = None) -> None:
        with self.db.write(durable=False, patience=2.0) as link:
            link.connection.execute(
                """update bg_worker
                    set cpu = max(ifnull(cpu, 0), ifnull(:cpu, 0)),
                        children_cpu = max(ifnull(children_cpu, 0), ifnull(:theirs, 0))
                    where id = :id""",
                {"id": worker, "cpu": cpu, "theirs": children_cpu},
            )
            name = link.connection.execute(
                """select name from bg_worker where id = :id""", {"id": worker}
            ).fetchone()
            if self._remove_idle(link.connection, worker):
                link.connection.execute(        # of these the last is enough
                    """delete from bg_event where action = 'worker_stop'""")
                note(link.connection, By(name[0], "worker"), "worker_stop", name[0],
                     None, self.now())

    def remove_dead(self, rows: Sequence[WorkerRow]) -> None:
        with self.db.write(durable=False, patience=0.5) as link:
            for row in rows:
                self._remove_idle(link.connection, row.id, row.beat_at)

    def _remove_idle(self, connection, worker, beat_at=None):
        """Unless it holds a task, or has beaten since; return whether it is off."""
        is_idle = connection.execute(
            f"""select 1 from bg_worker
                where id = :id and ifnull(:beat_at, beat_at) = beat_at
                    and not exists (select 1 from bg_task
                        where state = {RUNNING} and worker = :id)""",
            {"id": worker, "beat_at": beat_at},
        ).fetchone() is not None
        if is_idle:
            take_off(connection, worker)
        return is_idle

    def workers(self, after: int = 0, limit: int = -1) -> list[WorkerRow]:
        rows = self.db.read(
            WORKER_ROW + "where id > :after order by id limit :limit",
            {"after": after, "limit": limit},
        )
        return [WorkerRow(*row) for row in rows]

    def running_counts(self) -> dict[int, int]:
        return dict(self.db.read(
            f"""select worker, count(*) from bg_task where state = {RUNNING}
                group by worker"""
        ))


class SqliteStore(Endings, Desk, Facts, LiveRows, Timetable, Register, Attempts,
                  History):
    """The Store of one SQLite file: all its verbs, over one Database."""

    def __init__(self, path: str, durability: str = "full",
                 busy_timeout: float = 30.0, allow_network_fs: bool = False):
        self.db = Database(path, durability, busy_timeout, allow_network_fs)
        self.name = self.db.name
        self.create, self.close = self.db.create, self.db.close
        self.data_version, self.version = self.db.data_version, self.db.version
        self.glance = self.db.glance
        self.housekeep = self.db.checkpoint_if_large

    @property
    def path(self) -> str:
        """The real path of the file: another one when a link leads elsewhere."""
        return self.db.path

    def now(self) -> int:
        return now_ms()

    def last_id(self) -> int:
        return self.db.read(
            """select max(value, ifnull((select max(id) from bg_task), 0))
                from bg_meta where name = 'last_id'"""
        )[0][0]

    def sizes(self) -> Sizes:
        page, pages, free = (
            self.db.read(f"pragma {name}")[0][0]
            for name in ("page_size", "page_count", "freelist_count"))
        return Sizes(page * pages, self.db.wal_bytes(), page * free)

    @property
    def follow(self) -> bool:
        """Whether a file that takes the place of this one is used instead."""
        return self.db.follow

    @follow.setter
    def follow(self, follow: bool) -> None:
        self.db.follow = follow


def _open_sqlite(settings):
    s = settings
    return SqliteStore(s.db, s.durability, s.busy_timeout, s.allow_network_fs)


STORES[""] = _open_sqlite


###############################################################################
# BOOK THREE: THE WORKER
###############################################################################

# == Importing ================================================================
# Owns how an app is imported, by its name, and what is said when that fails.  An
# import must not enqueue: it happens for each worker, and perhaps in each child.

TRACEBACK_CHARS = 16_000       # kept of a traceback: its end


class Problem(PyBgWorkerError):
    """A command could not do (all of) its work; the message is for people."""


class UsageError(PyBgWorkerError):
    """The command line itself is wrong: exit status 2."""


def load_app(spec: str) -> App:
    """Import MODULE[:APP] and return its App.

    Without :APP it is the default App, or the only other App in the module.
    Raises AppError when there is no App of that name; what the import itself
    raises passes through.
    """
    module_name, _, attribute = spec.partition(":")
    App.serving = module_name           # the import must not enqueue
    try:
        module = importlib.import_module(module_name)
    finally:
        App.serving = ""
    if attribute:
        app = getattr(module, attribute, None)
        if not isinstance(app, App):
            raise AppError(f"--app {spec}: {module_name} has no App {attribute!r}")
    else:
        apps = {id(v): v for v in vars(module).values() if isinstance(v, App)}
        app = default_app
        if not app.tasks and len(apps) == 1:
            app, = apps.values()
    limit = getattr(module, "RATE_LIMIT", None)
    if limit is not None:
        app.suggest(rate_limit=limit)
    return app


def import_app(spec: str) -> App:
    """The app that --app names.  Raises Problem with its traceback."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        app = load_app(spec)
    except PyBgWorkerError:
        raise
    except BaseException as exc:
        _check_module_name(spec, exc)
        trace = describe_exception(exc)["traceback"]
        raise Problem(f"cannot import --app {spec}:\n{trace.rstrip()}") from None
    _hand_over()
    if not app.tasks:
        raise Problem(f"--app {spec}: it has no task: decorate a function with @task")
    return app


def _check_module_name(spec, exc):
    """Raise UsageError when it was the path of a file."""
    name, colon, attribute = spec.partition(":")
    if isinstance(exc, (ImportError, TypeError)) and re.search(r"/|\.py$", name):
        meant = os.path.normpath(re.sub(r"\.py$", "", name)).replace("/", ".")
        raise UsageError(
            f"--app {spec}: it is the name of a module, not of its file: "
            f"--app {meant.strip('.')}{colon}{attribute}"
        ) from None


class OtherCopy(PyBgWorkerError):
    """The app has imported this file by another name: its tasks are there."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


def _hand_over():
    """Raise OtherCopy when `python vendor/pybgworker.py` serves an app that says
    `from vendor.pybgworker import task`."""
    own = os.path.realpath(__file__)
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path and name != "__main__" and hasattr(module, "main") \
                and module is not sys.modules.get(__name__) \
                and os.path.realpath(path) == own and not default_app.tasks:
            raise OtherCopy(name)


def text_of(fn, *args):
    """Call what may be an exception's own, broken, code."""
    try:
        return str(fn(*args))
    except BaseException as exc:
        return f"<it cannot be printed: {type(exc).__name__}>"


def _is_machinery(path):
    """True for this file, and for what imports an app."""
    return path in (__file__, importlib.__file__) \
        or path.startswith("<frozen importlib")


def describe_exception(exc: BaseException) -> dict:
    """kind, type, message and traceback of any exception.  Never raises."""
    import traceback

    def text():
        own = exc.__traceback__
        while own is not None and _is_machinery(own.tb_frame.f_code.co_filename):
            own = own.tb_next           # begin where the user's code does
        return "".join(traceback.format_exception(type(exc), exc, own))

    return {
        "kind": "exception",
        "type": type(exc).__qualname__,
        "message": text_of(str, exc)[:TRACEBACK_CHARS],
        "traceback": text_of(text)[-TRACEBACK_CHARS:],
    }


# == Registry =================================================================
# Owns what a worker knows of an app: as much of each task as it takes to claim, to
# retry and to schedule it, and the settings that the app's code has made.  It can be
# sent as JSON, so that the worker need not import the app, whatever that does.


class Entry(NamedTuple):
    """One task, or callback of a task."""

    name: str
    parameters: tuple           # their names; *args and **kwargs with the stars
    queue: str
    priority: int
    policy: RetryPolicy         # its retry_for is judged in the child
    timeout: float | None
    rate_limit: float | None    # starts per second
    callbacks: int              # that it has: as in bg_task
    schedules: tuple            # (expr, tz, misfire, overlap, jitter, alert_after) of
                                # each @cron
    is_async: bool              # a call makes a coroutine
    max_running: int            # at a time, over all workers; 0: any number


def _entry_of(task):
    return Entry(
        task.name, parameters_of(task.fn), task.queue, task.priority,
        task.policy._replace(retry_for=()), task.timeout, task.rate_limit,
        task.callbacks,
        tuple((s.cron.expr, s.cron.tz, s.misfire, s.overlap, s.jitter, s.alert_after)
              for s in task.schedules),
        is_coroutine_function(task.fn), task.max_running or 0,
    )


class Registry(NamedTuple):
    """What a worker knows of an app."""

    app_spec: str               # MODULE[:APP]
    tasks: dict[str, Entry]     # by name
    code: dict                  # settings, by the app's code
    environ: dict               # … by the environment, which an import may change

    @classmethod
    def of(cls, app: App, app_spec: str) -> Registry:
        """What there is to know of an app of this process."""
        tasks = {name: _entry_of(task) for name, task in app.tasks.items()}
        environ = {name: value for name, value in os.environ.items()
                   if name.startswith("PYBGWORKER_")}
        return cls(app_spec, tasks, app.configured(), environ)

    def catalog(self) -> list:
        """The same as JSON can hold it."""
        return [self.app_spec, list(self.tasks.values()), self.code, self.environ]

    @classmethod
    def read(cls, catalog: list) -> Registry:
        """The Registry that such a catalog was made of."""
        app_spec, entries, code, environ = catalog
        tasks = {}
        for fields in entries:
            entry = Entry(*fields)
            tasks[entry.name] = entry._replace(
                parameters=tuple(entry.parameters),
                policy=RetryPolicy(*entry.policy)._replace(retry_for=()),
                schedules=tuple(map(tuple, entry.schedules)),
            )
        code = {name: tuple(value) if isinstance(value, list) else value
                for name, value in code.items()}
        return cls(app_spec, tasks, code, environ)

    def settings(self, flags: dict) -> types.SimpleNamespace:
        """All settings: flag beats environment beats code beats default."""
        return resolve_settings(self.code, self.environ, flags)


# == Processes ================================================================
# Owns all that depends on the operating system: starting, killing and reaping
# processes, sockets and pipes, memory, signal names.  A Windows half would define
# these same names; until it can be tested, workers run on Linux and macOS only.

try:
    import fcntl
    import resource
except ImportError:                         # Windows
    fcntl = resource = None                 # type: ignore[assignment]

IS_LINUX = sys.platform.startswith("linux")
_PEAK_UNIT = 1024 if IS_LINUX else 1        # of ru_maxrss, bytes
EXIT_GRACE = 2.0            # seconds for an idle child to run its exit handlers
# What a service manager, as systemd, has told this process alone.
_OF_THE_SERVICE = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}


# A nursery and its children live with the app, which may replace what the standard
# library gives: gevent.monkey.patch_all() makes sockets that wait by themselves, a
# close() that closes later, and a SIGCHLD that it alone hears.  What we live by is
# the system's own: bound here, before an app can be imported, or from the C module
# _socket.  Guarded by test_an_app_may_replace_the_standard_library.
OwnSelector = selectors.DefaultSelector
set_signal = signal.signal
close_fd = os.close
own_sleep = time.sleep
own_ident = threading.get_ident
own_poll: Any = getattr(select, "poll", None)
own_fork: Any = getattr(os, "fork", None)
own_rlock, OwnLocal = _thread.RLock, threading.local
own_lock = _thread.allocate_lock
own_start = _thread.start_new_thread
_waitid = getattr(os, "waitid", None)      # macOS has it since 3.13


def start_thread(work: Callable, name: str) -> None:
    """Start a native thread, also where an app has put greenlets in their place.

    Raises RuntimeError when there is none to be had.
    """
    if threading.get_ident is own_ident:
        # One that threading knows: what forks in another cannot run multiprocessing.
        threading.Thread(target=work, name=name, daemon=False).start()
    else:
        own_start(work, ())


@functools.cache
def _own_subprocess():
    """The module subprocess once more, for ourselves."""
    spec = importlib.util.find_spec("subprocess")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_platform() -> None:
    """Raise AppError where workers cannot run."""
    if fcntl is None:
        raise AppError("workers need Linux or macOS for now; delay() works here")


_CHILD_FDS, _WORKER_FDS = 7, 64     # descriptors: for each child, for the rest


def ensure_descriptors(children: int) -> None:
    """See that this process may open what so many children and a spare one need.

    Raises the soft limit where it is too low; AppError when the hard one is, or
    where workers cannot run.
    """
    check_platform()
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _WORKER_FDS + _CHILD_FDS * (children + 1)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
    except (ValueError, OSError):
        raise AppError(
            f"concurrency={children}: needs {needed} descriptors, and this process "
            f"may have {most}, which is enough for "
            f"{max(0, (most - _WORKER_FDS) // _CHILD_FDS - 1)}: see `ulimit -n`"
        ) from None


def signal_name(number: int) -> str:
    """SIGSEGV for 11."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class Exit(NamedTuple):
    """How a process ended."""

    signal: str | None          # its name, when one killed it
    code: int | None            # exit code otherwise; None: not known
    peak_bytes: int             # of resident memory
    cpu: float = 0.0            # seconds that it has used, and those it waited for


def interpreter() -> list[str]:
    """The command that starts this Python again, with the flags it was given."""
    flags = _own_subprocess()._args_from_interpreter_flags()
    return [sys.executable, *flags]


def spawn(argv: list[str], keep: Sequence[int], stdin: int, output: int) -> int:
    """Start a process in a session and group of its own; return its pid.

    It inherits the descriptors in `keep`, and writes stdout and stderr to `output`.
    """
    environ = {k: v for k, v in os.environ.items() if k not in _OF_THE_SERVICE}
    process = _own_subprocess().Popen(
        argv, stdin=stdin, stdout=output, stderr=output, pass_fds=keep, env=environ,
        start_new_session=True, close_fds=True,
    )
    process.returncode = 0      # this module reaps by wait4, for the peak memory
    return process.pid


def poll_exit(pid: int) -> Exit | None:
    """Reap a child process if it has ended; None while it lives."""
    try:
        found, status, usage = os.wait4(pid, os.WNOHANG)
    except ChildProcessError:               # somebody else reaped it
        return Exit(None, None, 0)
    if found == 0:
        return None
    peak, cpu = usage.ru_maxrss * _PEAK_UNIT, usage.ru_utime + usage.ru_stime
    if os.WIFSIGNALED(status):
        return Exit(signal_name(os.WTERMSIG(status)), None, peak, cpu)
    return Exit(None, os.WEXITSTATUS(status), peak, cpu)


def kill_group(pid: int) -> None:
    """SIGKILL a process group; nothing when it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def send_signal(pid: int, number: int) -> None:
    """Send a signal to a process that is not reaped yet."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Process:
    """A process that this one has started: signals to it, and how it ended."""

    def __init__(self, pid: int):
        self.pid = pid
        self.exit: Exit | None = None       # once it is dead

    def poll(self) -> Exit | None:
        """How it ended; None while it lives."""
        self.exit = self.exit or poll_exit(self.pid)
        return self.exit

    def signal(self, number: int) -> None:
        """Send it a signal, while it lives."""
        if not self.exit:
            send_signal(self.pid, number)

    def end(self, seconds: float) -> bool:
        """Wait for its end; after so many seconds kill it.  With it goes its group.

        False: it had to be killed.
        """
        deadline, by_itself = time.monotonic() + seconds, True
        while not self.poll():
            if time.monotonic() >= deadline:
                by_itself = False
                self.signal(signal.SIGKILL)
            own_sleep(0.001)
        kill_group(self.pid)            # what it has left behind
        return by_itself


def has_children() -> bool:
    """True when a process that this one has started lives, or is not waited for."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return True
    except (ChildProcessError, AttributeError):     # macOS has it since 3.13
        return False


def is_held() -> bool:
    """True when a thread lives that the interpreter waits for at its end."""
    return any(not thread.daemon and thread is not threading.main_thread()
               for thread in threading.enumerate())


def end_soon(status: int, seconds: float = EXIT_GRACE) -> None:
    """Grant those threads so long; then run exit handlers, and end the process."""
    has_ended = own_lock()
    has_ended.acquire()
    atexit.register(has_ended.release)

    def watch():
        while threading.main_thread().is_alive():
            own_sleep(0.05)
        if has_ended.acquire(timeout=seconds):
            return
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)

    own_start(watch, ())        # a greenlet would hold up all others


def others_write_here() -> bool:
    """True when a process that this one has started has its standard output, or error.

    Where /proc does not tell: when there is any such process at all.  The helpers of
    multiprocessing stay for good and write nothing; what a forkserver starts may.
    """
    if not has_children():
        return False
    try:
        own = {os.readlink(f"/proc/self/fd/{fd}") for fd in (1, 2)}
        pids = [pid for pid in _children_of("self") if own & _outputs_of(pid)]
        helpers = list(filter(_is_helper, pids))
        started = [pid for helper in helpers for pid in _children_of(helper)]
    except OSError:
        return True
    return len(pids) > len(helpers) or any(own & _outputs_of(pid) for pid in started)


def _children_of(pid):
    found = []
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as f:
            found += f.read().split()
    return found


def _is_helper(pid):
    with open(f"/proc/{pid}/cmdline", "rb") as f:
        command = f.read()
    return b"from multiprocessing.resource_tracker import" in command \
        or b"from multiprocessing.forkserver import" in command


def _outputs_of(pid):
    found = set()
    for fd in (1, 2):
        with contextlib.suppress(OSError):      # closed, or the process has ended
            found.add(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found


def is_lack(exc: BaseException) -> bool:
    """True for want of memory, space, descriptors or processes: it may pass."""
    no_thread = isinstance(exc, RuntimeError) and "start new thread" in str(exc)
    lacks = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)
    return isinstance(exc, MemoryError) or no_thread \
        or isinstance(exc, OSError) and exc.errno in lacks


def has_ended(pid: int) -> bool:
    """True when a process is dead, and not waited for; False without /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[:1] == [b"Z"]
    except OSError:
        return False


def memory_bytes(pid: int) -> int:
    """Resident memory of a process; 0 where /proc does not tell."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return 0


class Usage(NamedTuple):
    """What a process uses of the machine."""

    memory: int                 # bytes resident
    cpu: float                  # seconds, with those of its children that have ended


@functools.cache
def _tick_seconds():
    return 1 / os.sysconf("SC_CLK_TCK")


def usage_of(pid: int) -> Usage | None:
    """What this process uses now; None where /proc does not tell.  Takes 10 µs."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as f:
            found = f.read(4096)        # the name in it may be anything
        fields = found[found.rindex(b")") + 2:].split()
        return Usage(int(fields[21]) * resource.getpagesize(),
                     sum(map(int, fields[11:15])) * _tick_seconds())
    except (OSError, IndexError, ValueError):
        return None


def own_peak() -> int:
    """Bytes of memory that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT


def cpu_seconds() -> tuple[float, float]:
    """What this process, and what its children that have ended, computed so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (round(own.ru_utime + own.ru_stime, 3),
            round(ended.ru_utime + ended.ru_stime, 3))


def boot_id() -> str:
    """Identifies this boot of the machine; '' where it cannot be known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
            return f.read().strip()
    except OSError:
        return ""


def set_death_signal(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends.

    Where it can.  To be called by the process itself, after exec.
    """
    if IS_LINUX:
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, number)      # PR_SET_PDEATHSIG


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, where it can."""
    set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:              # it died before the call above
        os._exit(1)


def offer_to_die() -> None:
    """Out of memory this process shall go, before the one that has started it."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("500")


def have_fresh_signals() -> None:
    """Undo what whoever started us has ignored or blocked, and tasks rely on."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    set_signal(signal.SIGCHLD, signal.SIG_DFL)
    set_signal(signal.SIGPIPE, signal.SIG_IGN)


def bury(pid: int) -> Exit | None:
    """poll_exit(); first kill what the dead process has left of its group.

    Before: as long as it is not waited for, that number is nobody else's.
    """
    try:
        if _waitid and _waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            kill_group(pid)
        elif _waitid:
            return None
    except ChildProcessError:               # somebody else has waited for it
        pass
    found = poll_exit(pid)
    if found and not _waitid:
        kill_group(pid)
    return found


def is_stopped(pid: int) -> bool:
    """True while a process that we have started is stopped, and does nothing."""
    try:
        return _waitid is not None and _waitid(
            os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def dump_crashes(fd: int) -> None:
    """Have the Python stack written to `fd` at a crash, and at SIGUSR2.

    Also again, when somebody has put handlers of his own in the place of these.
    """
    import faulthandler

    faulthandler.disable()
    faulthandler.enable(file=fd, all_threads=True)
    faulthandler.unregister(signal.SIGUSR2)
    faulthandler.register(signal.SIGUSR2, file=fd, all_threads=True)


@contextlib.contextmanager
def stack_when_slow(fd: int, seconds: float) -> Iterator[None]:
    """Have the Python stack written to `fd` when this block lasts for so long."""
    import faulthandler

    with contextlib.suppress(RuntimeError):         # no thread to be had
        faulthandler.dump_traceback_later(seconds, file=fd)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# == Memory ===================================================================
# Owns what the system says of want of memory: the limits of this process, which its
# children have as well, how many have been killed for it, and where we are.  Where it
# does not say, nothing is known, and nothing is guessed.

_CGROUPS = "/sys/fs/cgroup"
NEAR = 0.9                  # of a limit: who had so much will have wanted more
_NO_LIMIT = 1 << 62         # version 1 of cgroups says a number near this for none


class Scarcity(NamedTuple):
    """What there is to say of memory when a process was killed."""

    counter: str = ""           # cgroup or machine: where kills are counted; or ""
    kills: int = 0              # new ones there
    limit: int | None = None    # bytes that the cgroup may have


def address_limit() -> int | None:
    """Bytes of addresses that this process may have, RLIMIT_AS; None: no limit."""
    if resource is None:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def near_address_limit(peak: int) -> list[str]:
    """Evidence that a fault comes from a want of addresses: empty for none."""
    limit = address_limit()
    is_near = limit is not None and peak >= NEAR * limit
    return [f"RLIMIT_AS {size_text(limit)}"] if limit and is_near else []


def out_of_memory(message: str) -> str:
    """The message of a MemoryError, with what this process had and may have."""
    limit = address_limit()
    parts = [f"peak {size_text(own_peak())}"]
    parts += [f"RLIMIT_AS {size_text(limit)}"] if limit else []
    return f"{message or 'out of memory'} ({', '.join(parts)})"


class OomKills:
    """Counts those whom the kernel kills for want of memory: in our cgroup, or, where
    that does not count, on the machine.

    Who is found dead has been counted before; look() is to be called once a second,
    so that an old kill is not taken for the cause of a new death.
    """

    def __init__(self, cgroups: str = _CGROUPS, own: str = "/proc/self/cgroup",
                 machine: str = "/proc/vmstat"):
        self._limits: list[tuple[str, str]] = []    # (file, name in it)
        self._files = [("machine", machine)]
        for path, is_second in _memory_cgroups(cgroups, own):
            kind, limit = (("memory.events", ("memory.max", "")) if is_second else
                           ("memory.oom_control",
                            ("memory.stat", "hierarchical_memory_limit")))
            self._files.insert(-1, ("cgroup", os.path.join(path, kind)))
            self._limits += [(os.path.join(folder, limit[0]), limit[1])
                             for folder in _with_parents(path, cgroups, is_second)]
        self._seen = self._count()
        self._fresh, self._old = 0, 0       # of this look, and of the one before

    def look(self) -> None:
        """Forget kills of which nobody has died."""
        self._take_in()
        self._old, self._fresh = self._fresh, 0

    def evidence(self) -> Scarcity:
        """What there is to say of somebody who was killed just now."""
        self._take_in()
        kills = self._old + self._fresh
        if self._old:
            self._old -= 1
        elif kills:
            self._fresh -= 1
        limits = [_number_in(*at) for at in self._limits]
        limit = min((n for n in limits if n is not None), default=_NO_LIMIT)
        return Scarcity(self._seen[0], kills, None if limit >= _NO_LIMIT else limit)

    def _take_in(self):
        counter, count = self._count()
        if counter == self._seen[0]:
            self._fresh += max(0, count - self._seen[1])
        self._seen = counter, count

    def _count(self):
        """(whose kills these are, how many there have been)."""
        for counter, path in self._files:
            count = _number_in(path, "oom_kill")
            if count is not None:
                return counter, count
        return "", 0


def _memory_cgroups(cgroups, own):
    """(folder, whether it is of version 2) of cgroups that limit us, perhaps.

    A container may see its own at the top, and name it by where the host has it.
    """
    try:
        with open(own, encoding="utf-8", errors="surrogateescape") as f:
            lines = [line.rstrip("\n").split(":", 2) for line in f]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        is_second = not controllers
        if is_second or "memory" in controllers.split(","):
            top = cgroups if is_second else os.path.join(cgroups, "memory")
            for folder in (os.path.join(top, path.lstrip("/")), top):
                if os.path.isdir(folder):
                    yield folder.rstrip("/"), is_second
                    break


def _with_parents(folder, top, is_second):
    """The folders whose limits hold: version 1 says the least of them in each."""
    found = [folder]
    while is_second and len(found[-1]) > len(top):
        found.append(os.path.dirname(found[-1]))
    return found


def _number_in(path, name):
    """The number behind a name in a file, or alone for none; None: there is none."""
    try:
        with open(path, encoding="ascii") as f:
            for line in f:
                words = line.split()
                if len(words) == 1 + bool(name) and name in ("", words[0]):
                    return int(words[-1])
    except (OSError, ValueError):
        pass
    return None


# == Channels =================================================================
# Owns the ways between the processes of one worker: sockets that block whatever an
# app has set, frames that stay whole and carry descriptors, pipes.  Knows nothing of
# what is said.

_PIPE_BYTES = 1 << 16               # of a pipe, in one read
_READS = 16                         # in a row from one pipe, at most
_STACK_HEADS = "Thread 0x", "Current thread 0x"
_STACK_FILE = re.compile(r'^  File "(.*)", line ', re.MULTILINE)
_FILES_OF_IDLE = (dump_crashes.__code__.co_filename, "/threading.py", "/selectors.py",
                  "/asyncio/base_events.py", "<string>")
_RIGHTS = 16                        # descriptors that come with one frame, at most


def own_socket(fd: int) -> _socket.socket:
    """A socket of ours: it blocks, whatever socket.setdefaulttimeout() was called with.

    Guarded by test_a_default_timeout_of_sockets_is_not_for_ours.
    """
    end = _socket.socket(fileno=fd)
    end.settimeout(None)
    return end


def socket_pair(kind: int = socket.SOCK_STREAM) -> tuple[_socket.socket, ...]:
    """Two such sockets that are connected."""
    pair = _socket.socketpair(socket.AF_UNIX, kind)
    for end in pair:
        end.settimeout(None)
    return pair


def frame_pair() -> tuple[_socket.socket, ...]:
    """A socket pair that keeps frames whole, so that either side can read one."""
    return socket_pair(socket.SOCK_SEQPACKET if IS_LINUX else socket.SOCK_DGRAM)


def dies_with(end: _socket.socket, wanted: bool) -> bool:
    """Have the kernel kill our process group once the other end of this is closed.

    Nothing may be sent either way while that is wanted.  False: it cannot be had.
    """
    try:
        flags = fcntl.fcntl(end, fcntl.F_GETFL) & ~os.O_ASYNC
        if wanted:
            fcntl.fcntl(end, fcntl.F_SETOWN, -os.getpgrp())
            fcntl.fcntl(end, fcntl.F_SETSIG, signal.SIGKILL)
            flags |= os.O_ASYNC
        fcntl.fcntl(end, fcntl.F_SETFL, flags)
        return wanted
    except (OSError, AttributeError):       # the latter: not on this system
        return False


def pipe_from(undo: contextlib.ExitStack,
              theirs: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe from a process to be started: the reading end, and the one for that.

    The first is closed when that fails, the other in any case.
    """
    reader, writer = os.pipe()
    undo.callback(close_fd, reader)
    theirs.callback(close_fd, writer)
    return reader, writer


def send_with(channel: _socket.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send a frame, and these descriptors with it.  Raises OSError."""
    rights = struct.pack(f"{len(fds)}i", *fds)
    more = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
    channel.sendmsg([data], more)


def receive_with(channel: _socket.socket, most: int) -> tuple[bytes, list[int]]:
    """A frame, and the descriptors that came with it, as far as there is room.

    Nothing at all: the other end is closed.
    """
    fds: list[int] = []
    try:
        data, more, *_ = channel.recvmsg(most, socket.CMSG_SPACE(_RIGHTS * 4),
                                         getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    except ConnectionError:
        return b"", []
    for level, kind, rights in more:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            size = len(rights) // 4
            fds += struct.unpack(f"{size}i", rights[:size * 4])
    for fd in fds:
        os.set_inheritable(fd, False)
    return data, fds


def watch_pipe(pipe: int) -> Callable[[], list]:
    """A function that returns an empty list when nothing waits in this pipe.

    One system call, in half the time of an ioctl().
    """
    poll = own_poll()
    poll.register(pipe, select.POLLIN)
    return functools.partial(poll.poll, 0)


def stack_pipe(undo: contextlib.ExitStack,
               theirs: contextlib.ExitStack) -> tuple[int, int]:
    """A pipe for the stacks that faulthandler writes; neither end ever waits.

    A process writes them in the middle of its crash, and nobody reads before its end:
    if it waited for room, which many threads use up, it would never die.
    """
    ends = pipe_from(undo, theirs)
    for fd in ends:
        os.set_blocking(fd, False)
    return ends


def read_stacks(fd: int, most: int) -> str:
    """Of what faulthandler has written to such a pipe, the first `most` characters.

    The thread that crashed comes first; those that only wait for work are left out.
    """
    text = read_all(fd, _READS * _PIPE_BYTES)[0].decode("utf-8", "replace")
    return _busy_stacks(text)[:most]


def _busy_stacks(text):
    parts = text.split("\n\n")
    stacks = [part for part in parts if part.startswith(_STACK_HEADS)]
    is_crash = bool(parts) and parts[0].startswith("Fatal Python error")
    crashed = [part for part in stacks if is_crash and part.startswith("Current")]
    busy = [part for part in stacks if part not in crashed and not _is_idle(part)]
    if not crashed + busy:
        return text
    first = stacks[0]
    others = [part for part in parts if part not in stacks]
    before = parts.index(first)
    return "\n\n".join(others[:before] + crashed + busy + others[before:])


def _is_idle(stack):
    """True when nobody's code is in this stack: only ours, and what ours waits in."""
    return all(name.endswith(_FILES_OF_IDLE) for name in _STACK_FILE.findall(stack))


def write_all(fd: int, data: bytes) -> None:
    """Write the whole of `data`, also where one write takes only a part."""
    while data:
        data = data[os.write(fd, data):]


def read_all(fd: int, most: int) -> tuple[bytes, bool]:
    """(what a pipe holds now, True at its end); bytes beyond `most` are dropped."""
    found, at_end = bytearray(), False
    for _ in range(_READS):         # not for ever, when somebody goes on writing
        try:
            chunk = os.read(fd, _PIPE_BYTES)
        except OSError:
            break
        if not chunk:
            at_end = True
            break
        found += chunk[: max(0, most - len(found))]
    return bytes(found), at_end


# == Fork safety ==============================================================
# Owns the question whether a process that has imported an app may be forked.  A fork
# copies one thread, and shares every descriptor: a lock that another thread holds is
# never released in the copy, and two processes that use one connection, or one open
# SQLite file, ruin it.  What it finds is told in words, for the log.

_PLAIN_DEVICES = frozenset(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty"))
_KINDS_OF_ANONYMOUS = {"eventpoll": "an epoll object", "eventfd": "an eventfd",
                       "inotify": "an inotify object", "timerfd": "a timer"}
_SQLITE_NAME = re.compile(r"(\.(sqlite3?|db3?)|-(wal|shm|journal))$")
_SQLITE_HEADER = b"SQLite format 3\0"
_THREAD_PATIENCE = 10       # looks for threads, 10 ms apart: one that is joined goes
_TRIAL_SECONDS = 1.0        # for a process that does nothing but end


def open_files() -> dict[int, str]:
    """What each descriptor of this process leads to; nothing without /proc."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def why_not_fork(before: dict[int, str]) -> str:
    """What makes it unsafe to fork this process, in words; empty: nothing does.

    `before` is what open_files() said before the app was imported.
    """
    if not IS_LINUX:
        return f"a fork is not safe on {sys.platform}"
    doing = _thread_found()
    for fd, target in sorted(open_files().items()):
        if not doing and before.get(fd) != target:
            what = _what_is_shared(fd, target)
            doing = what and f"opened {what}"
    return doing and f"the app {doing} while it was imported"


def _thread_found():
    for _ in range(_THREAD_PATIENCE):
        count = len(os.listdir("/proc/self/task"))
        if count == 1:
            return ""
        own_sleep(0.01)
    names = [thread.name for thread in threading.enumerate()
             if thread is not threading.main_thread()]
    if names:
        return f"started the thread {names[0]!r}"
    return "" if _threads_end_at_a_fork() else "loaded a library that started threads"


def _threads_end_at_a_fork():
    """True when the library that has started them ends them before each fork.

    So it has said that it is made for forks, and starts new ones when it needs them:
    OpenBLAS does, which NumPy loads.  Tried, for nothing else tells.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")     # that this process has threads
        pid = own_fork()
    if not pid:
        os._exit(0)
    deadline = time.monotonic() + _TRIAL_SECONDS
    while poll_exit(pid) is None:
        if time.monotonic() > deadline:     # it hangs in somebody's hook
            send_signal(pid, signal.SIGKILL)
        own_sleep(0.001)
    return len(os.listdir("/proc/self/task")) == 1


def _what_is_shared(fd, target):
    """What a descriptor is, in words, if two processes cannot share it."""
    kind, _, name = target.partition(":")
    if kind == "socket":
        return f"a socket{_address_of(fd)}"
    if kind == "pipe":
        return "a pipe"
    if kind == "anon_inode":
        return _KINDS_OF_ANONYMOUS.get(name.strip("[]"), name.strip("[]"))
    try:
        is_device = stat.S_ISCHR(os.fstat(fd).st_mode)
        is_sqlite = not is_device and (_SQLITE_NAME.search(target)
                                       or os.pread(fd, 16, 0) == _SQLITE_HEADER)
    except OSError:                     # closed meanwhile, or only written to
        return ""
    if is_device and target not in _PLAIN_DEVICES and target[:9] != "/dev/pts/":
        return f"the device {target}"
    return f"the SQLite file {target}" if is_sqlite else ""


def _address_of(fd):
    """Where a socket leads to, in words: what it is connected or bound to."""
    end = _socket.socket(fileno=os.dup(fd))
    try:
        for word, ask in (("to", end.getpeername), ("on", end.getsockname)):
            with contextlib.suppress(OSError):
                address = ask()
                if isinstance(address, tuple) and address[1]:       # else unbound
                    return f" {word} {address[0]}:{address[1]}"
                if isinstance(address, tuple):
                    return ""
                if address:
                    return f" {word} {os.fsdecode(address)!r}"
        return ""
    finally:
        end.close()


# == Wire =====================================================================
# Owns what a worker and its child say to each other, in which form, and the two
# sockets between them: frames with runs to the child, messages from it, each of a
# run, or of none.  Knows nothing of what either makes of it.
#
# Several frames may wait in a child's socket, so that it is never idle while the
# worker commits.  The worker keeps a duplicate of the receiving end and can read
# back what the child has not taken: each frame is got by exactly one of the two.

# A frame is this header, the name of the task, and its arguments as they are encoded.
_FRAME = struct.Struct("!qqddII")   # id attempt timeout tick cell length-of-the-name
_NO_TICK = -1.0
NO_CELL = 0xFFFFFFFF            # of a run whose beginning nobody notes: see Begun
_FRAME_BYTES = 1 << 16          # the longest; longer arguments are fetched

# A message is this header and a body of so many bytes; the id of no run is 0.
_MESSAGE = struct.Struct("!IcqqQd")     # length kind id attempt started_at duration
_MESSAGE_EXTRA_BYTES = 1 << 20      # one is never so much over max_payload
_MANY_FRAMES_BYTES = 1 << 20        # that a socket may hold; the system may allow less
_READ_BYTES = 1 << 18
_CANCEL = struct.Struct("!q")           # from the worker: the id of a run
CUT_OFF_STATUS = 117            # of a child whose connection a task has closed
LATEST_MS = 1 << 53             # no clock shows such a unix time
NONSENSE = (ValueError, TypeError, RecursionError)      # what reading one may raise


class Kind(NamedTuple):
    """A kind of message: what a body of it is made of, and read as."""

    code: bytes
    write: Callable[[Any], bytes]
    read: Callable[[Any], Any]      # of a bytearray


def _write_text(text):
    return text.encode("utf-8", "backslashreplace")


def _read_text(body):
    return body.decode("utf-8", "replace")


def _write_json(value):
    return to_json(value).encode()


def _read_result(body):
    return body.decode("ascii")


READY = Kind(b"R", _write_json, json.loads)         # names of tasks: it has the app
BROKEN = Kind(b"B", _write_text, _read_text)        # traceback: it cannot import it
LACKING = Kind(b"L", _write_text, _read_text)       # … for want of what may come later
UNKNOWN = Kind(b"U", bytes, bytes)                  # nothing: no task has this name
SUCCEEDED = Kind(b"S", str.encode, _read_result)    # the encoded result
ENDED_BADLY = Kind(b"F", _write_json, json.loads)   # the error, as settle() reads it
PRINTED = Kind(b"O", _write_text, _read_text)       # text
PROGRESSED = Kind(b"P", _write_json, json.loads)    # [percent, message]
SKIPPED = Kind(b"K", _write_json, json.loads)       # characters that are not sent
WRITTEN = Kind(b"W", bytes, bytes)                  # what the pipe held: see Output
STRAYS = Kind(b"X", _write_json, json.loads)        # whether others write there
LAGGED = Kind(b"G", _write_json, json.loads)        # [seconds, stack]: see Coroutines
SPENT = Kind(b"E", _write_text, _read_text)         # why it should be replaced
_KINDS = {kind.code: kind for kind in (
    READY, BROKEN, LACKING, UNKNOWN, SUCCEEDED, ENDED_BADLY, PRINTED, SKIPPED,
    PROGRESSED, WRITTEN, STRAYS, LAGGED, SPENT,
)}


def write_frame(run: Run, cell: int = NO_CELL) -> bytes:
    """The bytes that make a child run this; a limit of 0 is none."""
    tick = _NO_TICK if run.tick is None else run.tick
    head = _FRAME.pack(
        run.id, run.attempt, run.timeout or 0, tick, cell, len(run.name))
    return head + f"{run.name}{run.args or ''}".encode()


def read_frame(frame: bytes) -> tuple:
    """(id, attempt, timeout, tick or None, cell, name, text of the arguments)."""
    run_id, attempt, timeout, tick, cell, size = _FRAME.unpack_from(frame)
    text = frame[_FRAME.size:].decode()
    return (run_id, attempt, timeout, None if tick == _NO_TICK else tick, cell,
            text[:size], text[size:])


def write_message(kind: Kind, value: Any, of: tuple[int, int] = (0, 0),
                  started_at: int = 0, duration: float = 0.0) -> bytes:
    """The bytes by which a child says this of a run: (id, attempt)."""
    body, (run_id, attempt) = kind.write(value), of
    return _MESSAGE.pack(
        len(body), kind.code, run_id, attempt, started_at, duration
    ) + body


class ChildSpec(NamedTuple):
    """What a child must know from the start; passed to it as JSON."""

    module: str         # the name this file is imported by
    app: str            # MODULE[:APP]
    path: list          # sys.path
    parent: int         # pid
    frames: int         # descriptor to read frames from
    messages: int       # descriptor to send messages to
    crash: int          # descriptor for the Python stack of a crash
    output: int         # the reading end of the pipe behind descriptors 1 and 2
    settings: dict      # that differ from the environment
    beside: int = -1    # descriptor to read the frames of coroutines from; -1: none
    begun: int = -1     # descriptor of the mapping of what has begun; -1: none
    threads: int = 1    # ordinary tasks at a time; 1: on the main thread
    coroutines: int = 0         # async tasks at a time; 0: no frames come for them


# What a ChildSpec has of descriptors; -1 for one that there is not.
CHILD_ENDS = ("frames", "beside", "messages", "crash", "output", "begun")


class ChildEnd:
    """The child's end of the connection to its worker: frames in, messages out."""

    def __init__(self, frames: int, messages: int, beside: int = -1):
        self.frames = own_socket(frames)
        self.messages = own_socket(messages)
        self.beside = own_socket(beside) if beside >= 0 else None
        # Held while a message is written: threads of a task may print too, and so
        # may a signal handler or a finalizer in the middle of that.
        self._lock = own_rlock()
        self._sender = 0            # ident of the thread that is writing one
        self._outbox: collections.deque = collections.deque()   # to be written

    def receive_now(self) -> bytes | None:
        """The frame that is there; None: there is none, or it has to be waited for."""
        try:
            return self.frames.recv(_FRAME_BYTES, socket.MSG_DONTWAIT)
        except OSError:
            return None

    def receive(self) -> bytes:
        """Wait for a frame; empty: the worker has closed its end, or is gone."""
        return self._receive(self.frames)

    def receive_beside(self, wait: bool) -> bytes | None:
        """The same of the runs that go beside others; None: it has to be waited for."""
        assert self.beside is not None
        if wait:
            return self._receive(self.beside)
        try:
            return self.beside.recv(_FRAME_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as exc:
            self.end_if_closed(exc)
            return b""

    def _receive(self, end):
        while True:
            try:
                return end.recv(_FRAME_BYTES)
            except BlockingIOError:         # a task has changed our descriptors
                end.setblocking(True)
            except OSError as exc:
                self.end_if_closed(exc)
                return b""

    def send(self, message: bytes) -> None:
        """Write a message, whole; also within the writing of another: after it."""
        with self._lock:
            self._outbox.append(message)
            if self._sender:
                return
            self._sender = own_ident()
            try:
                while self._outbox:
                    self._write(self._outbox.popleft())
            finally:
                self._sender = 0

    def is_sending(self) -> bool:
        """True in the thread that is in the middle of a message."""
        return self._sender == own_ident()

    def _write(self, message):
        try:
            while message:
                try:
                    message = message[self.messages.send(message):]
                except BlockingIOError:         # as above
                    self.messages.setblocking(True)
        except OSError as exc:              # the worker is gone
            self.end_if_closed(exc)
            kill_group(os.getpid())

    def end_if_closed(self, exc: OSError) -> None:
        """Say by our exit status that it was a task which closed the connection."""
        if exc.errno in (errno.EBADF, errno.ENOTSOCK):
            os._exit(CUT_OFF_STATUS)

    def wanted(self) -> set[int] | None:
        """Ids of the runs that the worker wants to be cancelled; does not wait.

        None: it is gone.
        """
        try:
            wanted = self.messages.recv(4096, socket.MSG_DONTWAIT)
        except OSError:
            return set()
        return {number for number, in _CANCEL.iter_unpack(wanted)} if wanted else None

    def keep_open(self) -> None:
        """Till the very end: a socket that closes is taken for a death."""
        os.dup(self.messages.fileno())

    def close(self) -> None:
        """In a forked process, which has nothing to say."""
        for end in (self.frames, self.messages, self.beside):
            if end is not None:
                end.close()


class WorkerEnd:
    """The worker's end: frames out, and back again; messages in.  Never waits."""

    def __init__(self, undo: contextlib.ExitStack, has_beside: bool = False):
        self._frames, self._unread = frame_pair()
        self.messages, self._theirs = socket_pair()
        # Of frames for the event loop: (our end, what the child is to read).
        self._beside = frame_pair() if has_beside else ()
        for end in (self._frames, self._unread, self.messages, self._theirs,
                    *self._beside):
            undo.callback(end.close)
        # Not _unread: it shares its flags with the child's end, which has to wait.
        for end in (self._frames, self.messages, *self._beside[:1]):
            end.setblocking(False)
        for end in self._beside[:1]:        # as many as it may, all at once
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MANY_FRAMES_BYTES)
        self._buffer = bytearray()      # of messages, not yet whole
        self._is_deaf = False           # nothing is taken in any more

    def theirs(self) -> tuple[int, int, int]:
        """The descriptors that the child is to inherit: of frames, of messages, and
        of frames for its event loop, which is -1 for none."""
        beside = self._beside[1].fileno() if self._beside else -1
        return self._unread.fileno(), self._theirs.fileno(), beside

    def given(self) -> None:
        """The child has its own copies now."""
        self._theirs.close()

    def send(self, run: Run, cell: int = NO_CELL) -> bool:
        """Send a frame.  False when the socket is full, or the child just died."""
        try:
            self._frames.send(write_frame(run, cell)[:_FRAME_BYTES])
            return True
        except OSError:
            return False

    def send_beside(self, run: Run, cell: int = NO_CELL) -> bool:
        """The same, for the event loop."""
        try:
            self._beside[0].send(write_frame(run, cell)[:_FRAME_BYTES])
            return True
        except OSError:
            return False

    def recall(self) -> set[int]:
        """Read back the frames that the child has not taken; return the ids of runs."""
        return self._read_back(self._unread) | self.recall_beside()

    def recall_beside(self) -> set[int]:
        """The same, of those for the event loop."""
        return self._read_back(self._beside[1]) if self._beside else set()

    def _read_back(self, end):
        ids = set()
        with contextlib.suppress(OSError):      # EAGAIN: there are no more
            while frame := end.recv(_FRAME_BYTES, socket.MSG_DONTWAIT):
                ids.add(_FRAME.unpack_from(frame)[0])
        return ids

    def read(self) -> bool:
        """Take in what the child sent.  False when the socket is at its end."""
        while True:
            try:
                chunk = self.messages.recv(_READ_BYTES)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not chunk:
                return False
            if not self._is_deaf:
                self._buffer += chunk
            if len(chunk) < _READ_BYTES:
                return True

    def heard(self, max_payload: int) -> Iterator[tuple]:
        """Yield (kind, (id, attempt), value, started_at, duration) of whole messages.

        Raises one of NONSENSE for what cannot be one.
        """
        buffer, at, size = self._buffer, 0, _MESSAGE.size
        try:
            while len(buffer) - at >= size:
                length, code, run_id, attempt, started_at, duration = \
                    _MESSAGE.unpack_from(buffer, at)
                if length > max_payload + _MESSAGE_EXTRA_BYTES:
                    raise ValueError("a message that is too long")
                if code not in _KINDS:
                    raise ValueError("an unknown kind of message")
                if not (0 <= started_at < LATEST_MS and 0 <= duration < LATEST_MS):
                    raise ValueError("a time that cannot be")
                start, end = at + size, at + size + length
                if len(buffer) < end:
                    break
                at, kind = end, _KINDS[code]
                yield (kind, (run_id, attempt), kind.read(buffer[start:end]),
                       started_at, duration)
        finally:
            del buffer[:at]

    def go_deaf(self) -> None:
        """Let go of what has come, and take in nothing more."""
        self._buffer, self._is_deaf = bytearray(), True

    def cancel(self, run_id: int) -> None:
        """Name the run that is to be cancelled; a signal has to say that it is so."""
        with contextlib.suppress(OSError):
            self.messages.send(_CANCEL.pack(run_id))

    def hang_up(self) -> None:
        """Let the child see that no more will come."""
        for end in (self._frames, self._unread, *self._beside):
            end.close()

    def close(self) -> None:
        self.hang_up()
        self.messages.close()


# == Begun ====================================================================
# Owns the proof of what the children of a dead worker had begun: a file of cells,
# DATABASE-begun-WORKER.  A run that is sent to a child has a cell of its own until
# what became of it is committed; the child marks the cell, then begins.  So a run
# without a mark had not begun, and costs its task no attempt.
#
# Why that is a proof.  A mark is in the kernel's pages as soon as it is stored: a
# kill takes nothing back, and half a mark is that of a run which has not begun.
# And none is on its way when the cells are read: all who could begin a run have this
# file from their worker, by a descriptor or by the mapping made of that, and with it
# one lock, flock(), which the kernel drops when the last of them is gone.  Whoever
# gets that lock knows that they are dead, those that a SIGSTOP holds up included.
# (On overlay the mapping does not count.  But a task that closes the descriptors of
# its process closes that of the frames as well: such a child begins nothing more.)
# Where it is not to be had, or the file is from before a boot, all had begun.
# Guarded by Torture, and by test_cells_are_read_when_all_are_dead.

_BEGUN_HEAD = struct.Struct("16s48s")   # what it is, id of the boot; then the cells
_BEGUN_MAGIC = b"pybgworker begun"
_CELL_BYTES = 8
_ATTEMPT_BITS = 14          # of a mark; an id has the other 50, see MOST_ID
_ATTEMPTS = (1 << _ATTEMPT_BITS) - 1
_MOST_BEGUN_BYTES = 64 << 20
# Where what fallocate() gives is given: a full disk is SIGBUS to who writes a page.
# Not so where what is overwritten goes to another place, as with btrfs and zfs.
_STEADY_FILE_SYSTEMS = frozenset(("ext2", "ext3", "ext4", "overlay", "tmpfs", "xfs"))


def _mark_of(run_id, attempt):
    """Never 0.  Attempts that are 16,384 apart look the same: as begun, at worst."""
    return run_id << _ATTEMPT_BITS | attempt & _ATTEMPTS


def _begun_head():
    return _BEGUN_HEAD.pack(_BEGUN_MAGIC, boot_id().encode())


class Marks:
    """The cells as a child sees them, by the descriptor it was given; -1: none."""

    def __init__(self, fd: int):
        self._cells: Any = None
        if fd >= 0:
            import mmap

            self._map = mmap.mmap(fd, 0)
            self._cells = memoryview(self._map)[_BEGUN_HEAD.size:].cast("Q")
            close_fd(fd)

    def mark(self, cell: int, run_id: int, attempt: int) -> None:
        """Note that this run begins now: before anything of it is done."""
        if cell != NO_CELL:             # _mark_of(); but this is done for each run
            self._cells[cell] = run_id << _ATTEMPT_BITS | attempt & _ATTEMPTS

    def leave(self) -> None:
        """In a forked process, which may outlive the worker: it begins nothing."""
        if self._cells is not None:
            self._cells.release()
            self._map.close()
            self._cells = None


class Begun:
    """The cells of one worker, as that gives them to its runs; or none at all."""

    def __init__(self):
        self.fd = -1                    # to be inherited by children; -1: no cells
        self._path = ""
        self._cells: dict[Run, int] = {}        # that runs have
        self._free: list[int] = []      # that came back
        self._most = 0                  # that there are

    def open(self, database: str, worker: int, most: int) -> None:
        """Make the file, with so many cells.  Never raises: then there are none."""
        self.close()
        self._path, self._most = f"{database}-begun-{worker}", most
        if file_system(database) not in _STEADY_FILE_SYSTEMS or not boot_id():
            return
        size = _BEGUN_HEAD.size + most * _CELL_BYTES
        with contextlib.ExitStack() as undo, contextlib.suppress(OSError):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)   # of one who had this id in another database
            undo.callback(self.remove)
            self.fd, _ = open_beside(
                database, self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            os.posix_fallocate(self.fd, 0, size)
            os.pwrite(self.fd, _begun_head(), 0)
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            undo.pop_all()

    @property
    def is_kept(self) -> bool:
        """True when the runs that wait in a pipe are no loss should we be killed."""
        return self.fd >= 0

    def give(self, run: Run) -> int | None:
        """Its cell, or NO_CELL.  None: all are given, so it cannot be sent now."""
        if self.fd < 0:
            return NO_CELL
        cell = self._cells.get(run)
        if cell is None:
            if self._free:
                cell = self._free.pop()
            elif len(self._cells) < self._most:
                cell = len(self._cells)     # all below are in use
            else:
                return None
            self._cells[run] = cell
        return cell

    def take(self, runs: Iterable[Run]) -> None:
        """What became of these is committed: their cells are free.

        Not before: whoever reaps us would find that they had not begun.
        """
        for run in runs if self._cells else ():
            cell = self._cells.pop(run, None)
            if cell is not None:
                self._free.append(cell)

    def close(self) -> None:
        """Let go of it; children may still have it."""
        if self.fd >= 0:
            close_fd(self.fd)
        self.fd, self._cells, self._free = -1, {}, []

    def remove(self) -> None:
        """Let go of it, and delete it: nobody shall find what had begun."""
        with contextlib.suppress(OSError):
            if self.fd >= 0 and file_identity(self.fd) == file_identity(self._path):
                os.unlink(self._path)
        self.close()


class _Begun(frozenset):
    """The marks that were found; contains the (id, attempt) of runs."""

    def __contains__(self, run):
        return super().__contains__(_mark_of(*run))


def read_begun(database: str, worker: int) -> tuple[bool, Container | None]:
    """(False while this worker or a child of it lives, what had begun).

    The latter is for Store.reap(): None where nobody can tell.  Never raises.
    """
    try:
        fd, is_ours = open_beside(database, f"{database}-begun-{worker}", os.O_RDONLY)
    except OSError as exc:
        return not is_lack(exc), None
    try:
        size = os.fstat(fd).st_size
        if not is_ours or size > _MOST_BEGUN_BYTES or not boot_id() \
                or os.pread(fd, _BEGUN_HEAD.size, 0) != _begun_head():
            return True, None
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        cells = os.pread(fd, size, 0)[_BEGUN_HEAD.size:]
        if len(cells) % _CELL_BYTES or len(cells) != size - _BEGUN_HEAD.size:
            return True, None
        return True, _Begun(memoryview(cells).cast("Q"))
    except BlockingIOError:
        return False, None
    except OSError:
        return True, None
    finally:
        close_fd(fd)


def forget_begun(database: str, workers: Iterable[int]) -> None:
    """Delete what reaped workers have left.  Never raises."""
    for worker in workers:
        with contextlib.suppress(OSError):
            os.unlink(f"{database}-begun-{worker}")


def begun_left(database: str) -> list[int]:
    """The workers whose cells lie beside the database."""
    folder, name = os.path.split(database)
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return []
    found = (re.fullmatch(r"-begun-(\d{1,18})", n[len(name):]) for n in names
             if n.startswith(name))
    return [int(match[1]) for match in found if match]


# == Output ===================================================================
# Owns how what a task prints becomes whole lines of the right run.  Two ways lead
# to the worker: text that Python prints comes in messages, which name the run;
# what C code and subprocesses write to descriptors 1 and 2 comes by a pipe, which
# does not.  So the child empties the pipe before it answers, and says when a
# process of an earlier run still holds it: what comes then is nobody's for sure.
#
# A run that prints much must not keep its worker busy.  What Python prints beyond
# OUTPUT_CHARS is held in the child, and sent a few times a second: the end of it.

OUTPUT_CHARS = 2 * OUTPUT_PART  # of a run are sent at once, and logged
_HELD_SECONDS = 0.25            # that more of it is held before it is sent
_CUT_MARK = "\n[more output is not logged]\n"
LINE_BYTES = 1 << 16           # a longer line from a pipe is cut
_LINE_PARTS = 1000              # so many writes without a line end are a line


def cut_output(text: str, before: int) -> str:
    """The part of `text` to log after `before` characters of the same run."""
    room = OUTPUT_CHARS - before
    if len(text) <= room:
        return text
    return text[:room] + _CUT_MARK if room >= 0 else ""


class TaskStream(io.TextIOBase):
    """Stands in for sys.stdout and sys.stderr: whole lines go to `emit(text, fd)`.

    Each thread of each run has the beginning of its line to itself, so that lines of
    many threads, and of coroutines in one, stay whole.  Whatever an app does to a text
    stream may be done to it (reconfigure, detach, close, wrap its buffer), and it goes
    on.
    """

    encoding, errors, newlines, closed = "utf-8", "backslashreplace", None, False
    line_buffering, write_through, mode = True, False, "w"
    unended: set[TaskStream] = set()        # in which a line may have been begun
    places: set[int] = set()                # idents of threads that run tasks

    def __init__(self, emit: Callable[[str, int, Any], None], fd: int):
        self._emit, self._fd = emit, fd     # emit(text, fd, the run or None)
        # By thread and run: the parts of its line so far.
        self._begun: dict[tuple, collections.deque] = {}
        self.name = "<stdout>" if fd == 1 else "<stderr>"
        self.buffer = _TaskBuffer(self)

    def write(self, text: str, /) -> int:
        """Send `text` up to its last line end; keep the rest for the next write."""
        if not isinstance(text, str):
            raise TypeError(f"write() takes str, not {type(text).__name__}")
        line, end, rest = text.rpartition("\n")
        if end:
            self._send(line + end)
        if rest:
            self._begin(rest)
        return len(text)

    def flush(self) -> None:
        """Send what this thread has begun, whole line or not."""
        if self._begun:
            self._send("")

    def _begin(self, rest):
        """Keep a part of a line.

        A signal handler, or a finalizer, that prints may come between any two steps
        and send what is begun: then this part belongs to a new beginning.  Guarded
        by test_a_print_in_the_middle_of_a_print_arrives.
        """
        who, size = (threading.get_ident(), current_task()), len(rest)
        while rest is not None:
            begun = self._begun.setdefault(who, collections.deque())
            begun.append(rest)
            is_sent_without = self._begun.get(who) is not begun and begun
            rest = begun.pop() if is_sent_without else None
        TaskStream.unended.add(self)
        if len(begun) > _LINE_PARTS or size > OUTPUT_CHARS:
            self.flush()

    def _send(self, text):
        """Send what this thread has begun, and `text`.  Taken in one step."""
        who = threading.get_ident(), current_task()
        begun = self._begun.pop(who, None)
        if begun:
            text = "".join(begun) + text
            begun.clear()
        if text:
            self._emit(text, self._fd, who[1])

    def end_run(self) -> None:
        """Send what is begun, but for the lines of threads that still run.

        Nor of other runs.
        """
        self.unended.discard(self)
        if self.buffer.begun:
            self.buffer.flush()
        if not self._begun:
            return
        self.flush()
        if not self._begun:
            return
        self.unended.add(self)
        # A thread that has ended may have left its ident to another.
        ending = current_task()
        alive = {thread.ident for thread in threading.enumerate()
                 if owner_of(thread) in (None, ending)} - self.places
        for who in list(self._begun):
            thread, own = who
            if thread not in alive and (own is ending or own not in in_flight):
                text = "".join(self._begun.pop(who, ()))
                if text:
                    self._emit(text, self._fd, own)

    def forget(self) -> None:
        """In a forked process: what was begun is the other's to print."""
        self._begun.clear()
        self.buffer.forget()

    def reconfigure(self, *, encoding: str | None = None, errors: str | None = None,
                    newline: str | None = None, line_buffering: bool | None = None,
                    write_through: bool | None = None) -> None:
        """Take what a TextIOWrapper takes; text travels as UTF-8 all the same."""
        codecs.lookup(encoding or self.encoding)
        codecs.lookup_error(errors or self.errors)
        self.flush()
        self.encoding, self.errors = encoding or self.encoding, errors or self.errors

    def detach(self) -> _TaskBuffer:        # type: ignore[override]
        """The buffer; this stream stays usable."""
        return self.buffer

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """A task may close it; the next one must still be able to print."""


class _TaskBuffer(io.BufferedIOBase):
    """The `buffer` of a TaskStream: bytes that become its text, line by line."""

    closed = False                          # type: ignore[assignment]

    def __init__(self, stream: TaskStream):
        self._stream, self.name, self.mode = stream, stream.name, "wb"
        self.begun: dict[Any, LineCutter] = {}      # by run: a line that has not ended
        self._lock = own_rlock()            # guards begun
        self.raw = self                     # type: ignore[assignment]

    def write(self, data: Any, /) -> int:
        """Pass on the whole lines."""
        data, own = bytes(data), current_task()
        with self._lock:
            text = self.begun.setdefault(own, LineCutter()).cut(data)
            if not self.begun[own].rest:
                del self.begun[own]
        self._stream.unended.add(self._stream)
        self._stream.write(text)
        return len(data)

    def flush(self) -> None:
        """Pass on what is there, whole line or not."""
        with self._lock:
            lines = self.begun.pop(current_task(), None)
        if lines is not None:
            self._stream.write(lines.cut(b"", at_end=True))
        self._stream.flush()

    def forget(self) -> None:
        """As for the stream; a thread that had the lock is not here to release it."""
        self.begun = {}
        self._lock = own_rlock()

    def detach(self) -> _TaskBuffer:        # type: ignore[override]
        return self

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        """As for the stream; whoever wraps the buffer closes it in the end."""
        self.flush()


class Printer:
    """What the runs of one child print by Python, as messages of the right run.

    A thread that outlives its run speaks for no other.
    """

    def __init__(self, say: Callable):
        self._say = say             # say(kind, value, of)
        self._strange_chars = 0     # printed for no run …
        self._since: Any = None     # … since this one began, the latest
        self._is_fork = False
        self.held: dict[Any, Kept] = {}     # by run: what it has printed since …
        self._sent: dict[Any, float] = {}   # … that was sent, at this time, monotonic
        self._lock = own_rlock()            # guards both, and the order of what is sent
        self.streams = TaskStream(self.print, 1), TaskStream(self.print, 2)

    def speak_by(self, say: Callable) -> None:
        """From now on what is printed goes this way."""
        self._say, self._strange_chars = say, 0

    def print(self, text: str, fd: int, own: Any = None) -> None:
        """Send what a task printed; beyond OUTPUT_CHARS of its run, soon."""
        if self._is_fork:
            write_all(fd, text.encode("utf-8", "backslashreplace"))
            return
        run = in_flight.get(own)
        if run is None:             # it has ended, or it is nobody's
            of, latest = (0, 0), next(reversed(list(in_flight)), None)
            if latest is not self._since:
                self._since, self._strange_chars = latest, 0
            text = cut_output(text, self._strange_chars)
            self._strange_chars += len(text)
        else:
            of = run.of
            room = max(0, OUTPUT_CHARS - run.chars)
            run.chars += len(text)
            if len(text) > room:
                self._hold(run, text[:room], text[room:])
                return
        if text:
            self._say(PRINTED, text, of)

    def _hold(self, run, text, rest):
        """Send the one, and keep the other for a moment if much was sent just now."""
        with self._lock:
            if text:
                self._say(PRINTED, text, run.of)
            is_first = run not in self.held
            self.held.setdefault(run, Kept(0)).add(rest)
            if time.monotonic() - self._sent.get(run, -math.inf) >= _HELD_SECONDS:
                self._release(run)
                return
        if is_first:
            try:
                own_start(self._release_later, (run,))
            except RuntimeError:            # there is no thread to be had
                self._release(run)

    def _release_later(self, run):
        own_sleep(_HELD_SECONDS)
        if not self._is_fork:
            self._release(run)

    def _release(self, run):
        with self._lock:
            held = self.held.pop(run, None)
            if held is not None:
                self._sent[run] = time.monotonic()
                (_, _), (skipped, text) = held.parts()
                if skipped:
                    self._say(SKIPPED, skipped, run.of)
                self._say(PRINTED, text, run.of)

    def release(self, run: Any) -> None:
        """Send what is held of a run that ends."""
        self._release(run)
        self._sent.pop(run, None)

    def end_run(self) -> None:
        """What this run has printed is its own; what comes later may not be."""
        for stream in self.streams:
            stream.end_run()

    def leave(self) -> None:
        """In a forked process: what was begun is the other's to print."""
        self._is_fork, self._lock = True, own_rlock()
        for stream in self.streams:
            stream.forget()


class LineCutter:
    """Makes text of bytes that come in pieces; cuts it at line ends only."""

    def __init__(self):
        self.rest = b""         # of a line that has not ended

    def cut(self, data: bytes, at_end: bool = False) -> str:
        """The whole lines so far; at the end, or of an endless line, also a part."""
        data = self.rest + data
        size = data.rfind(b"\n") + 1
        if at_end:
            size = len(data)
        elif len(data) - size > LINE_BYTES:    # … but never inside a character
            size = codecs.utf_8_decode(data, "backslashreplace", False)[1]
        self.rest = data[size:]
        return data[:size].decode("utf-8", "backslashreplace")


class OutputPipe:
    """The worker's end of what C code and subprocesses of one child write."""

    def __init__(self, fd: int):
        os.set_blocking(fd, False)
        self.fd = fd
        self.is_mute = False        # nobody can write to it any more
        self.strays = False         # … processes of earlier runs can
        self._will_stray = False    # the same, from the next run on
        self._listens = False       # the selector tells of it
        self._lines = LineCutter()

    def begin(self) -> None:
        """From now on another run writes."""
        self.strays = self._will_stray

    def set_strays(self, strays: bool) -> None:
        """Whether processes of this run may write to it in the next ones."""
        self._will_stray = strays

    def mind(self, selector: selectors.BaseSelector, wanted: bool, data: Any) -> None:
        """Have the selector tell of it, or not, while that is wanted."""
        wanted = wanted and not self.is_mute
        if wanted and not self._listens:
            selector.register(self.fd, selectors.EVENT_READ, data)
        elif self._listens and not wanted:
            selector.unregister(self.fd)
        self._listens = wanted

    @property
    def is_unheard(self) -> bool:
        """True when there will be something to read that nobody tells of."""
        return not (self._listens or self.is_mute)

    def read(self) -> bytes:
        """What it holds."""
        data, self.is_mute = read_all(self.fd, 4 * OUTPUT_CHARS)
        return data

    def cut(self, data: bytes, at_end: bool = False) -> str:
        """The whole lines so far, with `data`; at the end also what is left."""
        return self._lines.cut(data, at_end) if data or self._lines.rest else ""


# == Log lines ================================================================
# Owns that what a task says by the module logging is part of its output, where nobody
# has configured that.  Whoever does so, also while a task runs, has it as anywhere.
#
# logging is imported once, by the nursery; a child that is executed takes 5 ms and
# 0.4 MB for it.  Looking for it in each run instead would miss the first that uses it.

_LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def take_log_lines(level: str) -> None:
    """From now on log lines are printed, to what is sys.stderr then.

    Those from this level on, unless the app has set one for the root logger.  Does
    nothing if that has a handler.
    """
    import logging

    root, basic_config = logging.getLogger(), logging.basicConfig
    if root.handlers:
        return

    class TaskHandler(logging.StreamHandler):
        """The handler of a root logger that has no other."""

        def handle(self, record):
            # Somebody may have added one: then it is all that is wanted.
            return root.handlers == [self] and super().handle(record)

        def emit(self, record):
            try:
                text = self.format(record)
            except (TaskTimeout, TaskCancelled):    # it has come just here
                raise
            except Exception:
                self.handleError(record)
            else:
                sys.stderr.write(f"{text}\n")

    @functools.wraps(basic_config)
    def configure(**options):
        """As if we had added nothing."""
        root.removeHandler(handler)
        basic_config(**options)

    handler = TaskHandler()
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    root.addHandler(handler)
    if root.level == logging.WARNING:
        root.setLevel(level)
    logging.basicConfig = configure


# == Surroundings =============================================================
# Owns what a task may change of the process it runs in, and puts it back for the
# next: streams, descriptors, folder, environment, signals, timers, limits.  What a
# module holds is the app's own; what a process cannot undo stays: its priority and
# CPUs, a lowered hard limit.  --max-tasks-per-child 1 gives each task a new process.


def standard_streams() -> tuple:
    """sys.stdin, stdout and stderr, as they are now; None where one was deleted."""
    try:
        return sys.stdin, sys.stdout, sys.stderr
    except AttributeError:
        get = sys.__dict__.get
        return get("stdin"), get("stdout"), get("stderr")


class _Environment:
    """os.environ, as the app's import has left it."""

    def __init__(self):
        self._environ, self._pairs = os.environ, os.environ.copy()
        self._encoded = dict(self._data())

    def _data(self):
        """The encoded pairs behind it: compared in 1 µs, not in 20."""
        return getattr(self._environ, "_data", self._environ)

    def restore(self):
        os.environ = self._environ      # noqa: B003 - a task may have replaced it
        if self._data() != self._encoded:       # also if those are others now
            os.environ.clear()
            os.environ.update(self._pairs)


class Surroundings:
    """What a task may change of its process, as the app's import has left it.

    The next task in this child shall find it so again.  What is cheap is compared
    after each run, and written only where it differs: 3 µs.  The rest takes 20, so it
    is put right while no run waits, and after each that lasted: see MainThread.
    Not by signal.getsignal(), which looks for an enum and takes as long as all else.
    """

    def __init__(self, handlers: dict):
        # Of signals: the child's own, whatever the app has set, and the app's.
        numbers = range(1, max(signal.valid_signals()) + 1)
        self._handlers = {number: _signal.getsignal(number) for number in numbers}
        self._handlers.update(handlers)
        self._often = [int(n) for n in (signal.SIGCHLD, signal.SIGPIPE, *handlers)]
        self._often_handlers = [self._handlers[number] for number in self._often]
        self._mask = _signal.pthread_sigmask(signal.SIG_BLOCK, ()) - handlers.keys()
        self._timers = [
            timer for timer in (signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)
            if not any(signal.getitimer(timer))     # else the app profiles itself
        ]
        self._environment = _Environment()
        self._streams = standard_streams()
        self._descriptors = [
            (own, fd, os.get_blocking(fd)) for fd in range(3) if (own := _copy(fd)) > 0
        ]
        self._folder = self._here()
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self._depth = sys.getrecursionlimit()
        self._timeout = _socket.getdefaulttimeout()
        self._limits = _soft_limits()
        self._policy = getattr(
            sys.modules.get("asyncio.events"), "_event_loop_policy", None)
        # Makes the context variables for a run, which keeps its changes to itself.
        self.context = _context_maker()

    def _here(self):
        try:
            return os.getcwd()
        except OSError:                 # somebody has deleted it
            return ""

    def restore(self, streams: tuple) -> None:
        """Undo what tasks have left behind, each its own.  Never raises."""
        self.restore_main()
        self.restore_shared(streams)

    def restore_main(self) -> None:
        """What is a main thread's own: nobody beside it has to do with it."""
        _signal.setitimer(_signal.ITIMER_REAL, 0)
        if list(map(_signal.getsignal, self._often)) != self._often_handlers:
            self._restore_handlers(self._often)
        _signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def restore_thread(self) -> None:
        """The same of another thread."""
        _signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def restore_shared(self, streams: tuple) -> None:
        """What all threads of a process share: so only while nobody else needs it."""
        if streams != self._streams:
            sys.stdin, sys.stdout, sys.stderr = self._streams
        if sys.getrecursionlimit() != self._depth:
            sys.setrecursionlimit(self._depth)
        if _socket.getdefaulttimeout() != self._timeout:
            _socket.setdefaulttimeout(self._timeout)
        events = sys.modules.get("asyncio.events")
        if events is not None and events._event_loop_policy is not self._policy:
            self._restore_policy(events)
        os.umask(self._umask)
        if self._here() != self._folder:
            with contextlib.suppress(OSError):
                os.chdir(self._folder)
        self._environment.restore()

    def _restore_handlers(self, numbers):
        """True when there was something to do."""
        touched = False
        for number in numbers:
            handler = self._handlers[number]
            if _signal.getsignal(number) is not handler and handler is not None:
                set_signal(number, handler)
                touched = True
        return touched

    def _restore_policy(self, events):
        """Who makes the next event loop.  asyncio itself sets it at its first use."""
        policy = events._event_loop_policy
        if self._policy is None and type(policy).__module__.startswith("asyncio."):
            self._policy = policy
        else:
            events._event_loop_policy = self._policy

    def restore_rest(self, is_main: bool = True) -> bool:
        """… and what takes longer to look at.  True: it was a signal.  Never raises.

        Only the main thread can have changed handlers, or can change them.
        """
        for timer in self._timers:
            _signal.setitimer(timer, 0)
        touched = is_main and list(map(_signal.getsignal, self._handlers)) \
            != list(self._handlers.values()) and self._restore_handlers(self._handlers)
        for limit, soft in self._limits:
            now, hard = resource.getrlimit(limit)
            if now != soft:
                with contextlib.suppress(ValueError, OSError):  # above the hard one
                    resource.setrlimit(limit, (soft, hard))
        with contextlib.suppress(OSError):      # it has closed all: our connection too
            for own, fd, is_blocking in self._descriptors:
                os.dup2(own, fd)
                os.set_blocking(fd, is_blocking)        # others share the pipe
        return touched

    def leave(self) -> None:
        """In a forked process: let go of what was kept for the next task here."""
        for own, *_ in self._descriptors:
            with contextlib.suppress(OSError):
                close_fd(own)
        self._descriptors = []


def _copy(fd):
    try:
        return os.dup(fd)
    except OSError:                     # it is closed
        return -1


def _soft_limits():
    """(number, soft limit) of all limits that this system has."""
    numbers = {getattr(resource, n) for n in dir(resource) if n[:7] == "RLIMIT_"}
    found = []
    for number in numbers:
        with contextlib.suppress(OSError, ValueError):
            found.append((number, resource.getrlimit(number)[0]))
    return found


_DECIMAL = "decimal_context"    # the name of its variable


def _context_maker():
    """A function that copies the context.

    A copy shares the decimal context, which is changed in place: where somebody has
    used it, it is copied, too.
    """
    found = [(variable, value.copy()) for variable, value
             in contextvars.copy_context().items() if variable.name == _DECIMAL]
    if not found:
        return contextvars.copy_context
    (variable, value), = found

    def copy():
        context = contextvars.copy_context()
        context.run(variable.set, value.copy())
        return context

    return copy


# == Interrupts ===============================================================
# Owns how a time limit, or a cancellation, gets into the middle of a task: the
# signals of a child.  Knows nothing of what the task is.

_FORK_PAUSE = 0.001             # seconds until what fell into a fork is raised


class Interrupts:
    """Raises a time limit, or a cancellation, in the middle of a task.

    But never in the middle of a message, or of a fork: then after it.
    """

    def __init__(self, wire: ChildEnd):
        self._wire, self._main_thread = wire, own_ident()
        self.allowed = False        # True while code of the task runs
        self.run: Any = None        # whose that is
        # Called with the ids of runs that are to be cancelled, whose ever they are.
        self.others: list[Callable[[set[int]], Any]] = []
        self.named: collections.deque = collections.deque()     # such as others read
        self.pending: BaseException | None = None       # to be, after a send, a fork
        self.forking = 0            # threads that are in the middle of os.fork()
        self._mask = OwnLocal()      # .before: of a thread that forks
        # Process managers signal whole groups: leave the end to our worker.  Not
        # SIG_IGN, which programs started by a task would inherit.
        self.handlers = {
            signal.SIGTERM: lambda *_: None, signal.SIGINT: lambda *_: None,
            signal.SIGALRM: self.on_alarm, signal.SIGUSR1: self.on_cancel,
        }

    def begin(self, run: Any) -> None:
        """From now on code of this run may be interrupted, which its `raised` says."""
        self.run, self.pending, self.allowed = run, None, True

    def on_alarm(self, *_: Any) -> None:
        """The time limit; or what could not be raised in the middle of a fork."""
        exc, self.pending = self.pending, None
        self._raise(exc or TaskTimeout("the time limit is reached"))

    def on_cancel(self, *_: Any) -> None:
        """The worker has written the id it means: that run may have just ended."""
        wanted = self._wire.wanted() or set()
        while self.named:
            wanted.add(self.named.popleft())
        for cancel in self.others if wanted else ():
            cancel(wanted)
        if self.run is not None and self.run.of[0] in wanted:
            self._raise(TaskCancelled(f"task {self.run.of[0]} is being cancelled"))

    def _raise(self, exc):
        """Guarded by test_a_time_limit_that_falls_into_a_fork_is_kept."""
        if not self.allowed:
            return
        self.run.raised = exc
        if self._wire.is_sending():
            self.pending = exc
        elif self.forking:      # where the interpreter would drop the exception
            self.pending = exc
            signal.setitimer(signal.ITIMER_REAL, _FORK_PAUSE)
        else:
            raise exc

    def pass_on(self, run_ids: set[int]) -> None:
        """From another thread, which has read these: they may be of the main one."""
        self.named.extend(run_ids)
        _signal.pthread_kill(self._main_thread, signal.SIGUSR1)

    def send(self, message: bytes) -> None:
        """Send it, and raise what fell into it."""
        self._wire.send(message)
        if self.pending is not None and own_ident() == self._main_thread:
            exc, self.pending = self.pending, None
            raise exc

    def before_fork(self) -> None:
        """Hold back signals that our handlers would swallow in the new process."""
        self.forking += 1
        self._mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, self.handlers)

    def after_fork(self) -> None:
        """In both processes."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask.before)
        self.forking -= 1

    def leave(self) -> None:
        """In a forked process: let signals do there what they do anywhere else."""
        for number, handler in self.handlers.items():
            if signal.getsignal(number) == handler:
                is_int = number == signal.SIGINT
                signal.signal(
                    number, signal.default_int_handler if is_int else signal.SIG_DFL
                )


_EARLY_SECONDS = 2.0            # for the frame of a run that is cancelled at its start
_ENDED_RUNS = 1000              # are remembered


class Early:
    """Cancellations that have come before the run they mean.

    What is sent to a thread, or to an event loop, counts as begun; but its frame may
    not have been taken yet.  One that comes after its run is for nobody.
    """

    def __init__(self):
        self._named: dict[int, float] = {}      # id: when, monotonic
        self._ended: collections.deque = collections.deque(maxlen=_ENDED_RUNS)

    def note(self, run_ids: set[int], now: float) -> None:
        """These are to be cancelled; whoever finds one of them here takes it."""
        if len(self._named) > _ENDED_RUNS:
            self._named.clear()
        self._named.update(dict.fromkeys(run_ids.difference(self._ended), now))

    def take(self, run_id: int, now: float) -> bool:
        """True when this run is to be cancelled."""
        return now - self._named.pop(run_id, -math.inf) < _EARLY_SECONDS

    def end(self, run_id: int) -> None:
        """It is over: who names it now is late."""
        self._ended.append(run_id)
        self._named.pop(run_id, None)


# == Runs =====================================================================
# Owns what is the same for a run of any kind in its child, from the frame to the one
# answer: its arguments and its result, what it prints, which error it is, what is put
# right behind it.  Where and how the task is called is the matter of the three sections
# that follow: on the main thread; in a thread; as a coroutine.
#
# While several runs are in flight nothing of the process is put back under a
# neighbour: it is when the last of them has ended.

SPAWN_SECONDS = 0.0002         # no run that started a process was shorter


class Running:
    """A run that is in flight from now on, in this child."""

    __slots__ = ("of", "task", "text", "timeout", "current", "chars", "raised",
                 "started_at", "start",
                 "cpu")     # seconds of it, once it has failed, if that is known

    def __init__(self, frame: bytes, app: App, report: Callable, mark: Callable):
        run_id, attempt, timeout, tick, cell, name, self.text = read_frame(frame)
        self.of = run_id, attempt
        self.task = app.tasks.get(name)
        self.timeout = timeout          # seconds; 0: none
        self.chars = 0                  # that it has printed
        self.raised: BaseException | None = None    # that we have put into it
        self.started_at = now_ms()
        self.start = time.perf_counter()
        due = time.monotonic() + timeout if timeout else None
        if tick is not None:
            tick = datetime.fromtimestamp(tick, timezone.utc)
        self.current = CurrentTask(run_id, name, attempt, due, tick, report)
        in_flight[self.current] = self
        if self.task is not None:
            mark(cell, run_id, attempt)


class Runs:
    """The runs of one child."""

    def __init__(self, wire: ChildEnd, spec: ChildSpec, printer: Printer,
                 send: Callable):
        self._wire, self.send = wire, send      # send(message)
        self._output = spec.output
        # There may be several at a time.
        self.is_shared = spec.threads > 1 or spec.beside >= 0
        self._lock = own_lock()     # guards _calls, and what is put back
        self._calls = 0             # of tasks, that are not over
        self.plain_streams: tuple = ()          # our own
        self.surroundings: Any = None           # once the app is imported
        self._watch = watch_pipe(spec.output)
        self._watching = own_lock()     # a poll object is for one thread at a time
        self._strays = False        # processes that earlier runs have started live
        self.printer = printer
        self.app: Any = None        # once it is imported
        self.is_fork = False        # this is a process that a task has forked
        self.begun = Marks(spec.begun)

    def say(self, kind: Kind, value: Any, of: tuple[int, int] = (0, 0),
            started_at: int = 0, duration: float = 0.0) -> None:
        """Send a message of this run, or of none."""
        self.send(write_message(kind, value, of, started_at, duration))

    def serve(self, frame: bytes, call: Callable) -> float:
        """Run what this frame says, by call(run, args, kwargs), and answer.

        Returns how many seconds it took.  In a process that the task has forked it
        does not return.
        """
        run = Running(frame, self.app, self.progress, self.begun.mark)
        if self.is_shared:
            running.set(run.current)
        value: Any = b""
        try:
            if run.task is None:
                kind = UNKNOWN
            else:
                args, kwargs = decode(run.text or self.app.store.args(run.of[0]))
                kind, value = SUCCEEDED, self.encoded(call(run, args, kwargs))
        except BaseException as exc:
            if self.is_fork:
                self.leave_fork(exc)
            kind, value = self.failed(run, exc)
        if self.is_fork:
            self.leave_fork(None)
        return self.end(run, kind, value)

    def begin(self, frame: bytes) -> Running:
        """From now on this run is in flight."""
        return Running(frame, self.app, self.progress, self.begun.mark)

    def enter(self) -> contextvars.Context:
        """A task is about to be called, beside others: in this context."""
        with self._lock:
            self._calls += 1
        return self.surroundings.context()

    def leave(self, is_main: bool = False) -> None:
        """It is over: what it left behind is undone, once no other is called.

        On the main thread not what takes longer to look at: see restore_rest().
        """
        streams = standard_streams()
        if streams != self.plain_streams:
            for stream in streams[1:]:          # they may hold output
                with contextlib.suppress(Exception):
                    stream.flush()
        with self._lock:
            self._calls -= 1
            if not self._calls:
                self.surroundings.restore_shared(streams)
                if not is_main:
                    self.surroundings.restore_rest(is_main=False)

    def restore_rest(self) -> bool:
        """What takes longer, on the main thread.  True: as Surroundings says."""
        with self._lock:
            return not self._calls and self.surroundings.restore_rest()

    def encoded(self, value: Any) -> Any:
        """The result as it is sent.  Raises _ResultRefused: it would be so again."""
        if value is None:
            return "null"
        try:
            text, limit = encode(value, "result"), self.app.settings.max_payload
            if len(text) > limit:           # it is ASCII: as many bytes
                raise PayloadTooLarge(
                    f"result of {len(text):,} bytes: PYBGWORKER_MAX_PAYLOAD allows "
                    f"{limit:,}; write it to a file and return its path"
                )
            return text
        except (TypeError, PayloadTooLarge) as exc:
            raise _ResultRefused(str(exc)) from exc

    def failed(self, run: Running, exc: BaseException) -> tuple[Kind, dict]:
        """The answer of a run that has ended like this."""
        used = {"peak": own_peak(), "cpu": getattr(run, "cpu", None)}
        return ENDED_BADLY, {**_error_of(exc, run), **used}

    def end(self, run: Running, kind: Kind, value: Any) -> float:
        """Answer.  Returns how many seconds it took."""
        duration = time.perf_counter() - run.start
        # What it has printed is its own; what comes later may not be.
        if TaskStream.unended:
            self.printer.end_run()
        if run.chars > OUTPUT_CHARS:
            self.printer.release(run)
        if self._has_written_now() if self.is_shared else self._watch():
            self._pass_on(run)
        if duration > SPAWN_SECONDS or self._strays:
            is_alone = len(in_flight) == 1
            strays = others_write_here() if is_alone else has_children()
            if strays != self._strays:
                self._strays = strays
                self.say(STRAYS, strays)
        self.say(kind, value, run.of, run.started_at, duration)
        del in_flight[run.current]
        return duration

    def _has_written_now(self):
        with self._watching:
            return self._watch()

    def _pass_on(self, run):
        """What C code and subprocesses have written is its own, if it is alone."""
        try:
            of = run.of if len(in_flight) == 1 else (0, 0)
            self.say(WRITTEN, os.read(self._output, LINE_BYTES), of)
        except BlockingIOError:             # the worker has read it meanwhile
            pass
        except OSError as exc:
            self._wire.end_if_closed(exc)
            raise

    def progress(self, current: CurrentTask, percent: float, message: Any) -> None:
        """What set_progress() does, while that run is in flight."""
        run = in_flight.get(current)
        if run is not None and not self.is_fork:
            text = None if message is None else str(message)[:1000]
            self.say(PROGRESSED, [percent, text], run.of)

    def forget(self) -> None:
        """In a forked process, where nobody can release what others had locked."""
        self._lock = own_lock()
        self._calls = 0

    def die(self) -> None:
        """A thread of ours cannot go on: end the child, as its main one does."""
        exc = sys.exc_info()[1]
        assert exc is not None
        self.printer.print(describe_exception(exc)["traceback"], 2)
        os._exit(1)

    def leave_fork(self, exc: BaseException | None) -> None:
        """A process that a task has forked came back here: end it as Python would."""
        code = 0
        if isinstance(exc, SystemExit):
            code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        elif exc is not None:
            code = 1
            self.printer.print(describe_exception(exc)["traceback"], 2)
        self.printer.end_run()
        os._exit(code & 0xFF)


class _ResultRefused(Abort):
    """The task has returned what cannot be sent; its cause says why."""


def _error_of(exc, run):
    """What the worker needs to decide; how a run has ended."""
    error = describe_exception(exc)
    if isinstance(exc, MemoryError):
        error["message"] = out_of_memory(error["message"])
    if isinstance(exc, _ResultRefused):
        error["type"] = type(exc.__cause__).__name__
    elif isinstance(exc, Abort):        # it wins, also over a time limit
        error["kind"] = "abort"
    elif run.raised is not None:
        timed_out = isinstance(run.raised, TaskTimeout)
        error["kind"] = "timeout" if timed_out else "cancelled"
    if isinstance(exc, Retry):
        error["countdown"] = _countdown(exc.countdown)
    expected = Retry, *run.task.policy.retry_for
    error["retryable"] = not isinstance(exc, Abort) and (
        error["kind"] == "timeout" or isinstance(exc, expected))
    if error["kind"] == "exception" and not isinstance(exc, (Abort, expected)):
        error["retry_for"] = [cls.__qualname__ for cls in expected[1:]]
    return error


def _countdown(value):
    """Seconds, within reason; None, for the task's own delay, when it is no number."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if not isinstance(seconds, (int, float)) or seconds != seconds:
        return None
    return float(min(max(seconds, 0), LONGEST_SECONDS))


def run_coroutine(coroutine: types.CoroutineType) -> Any:
    """Run a coroutine to its end in a loop of its own, and end what it has started.

    Not asyncio.run(), which leaves the thread without a current loop: a later task
    that asks for one shall find what a fresh process has.
    """
    import asyncio

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        try:
            left = asyncio.all_tasks(loop)
            for each in left:
                each.cancel()
            loop.run_until_complete(_all_of(left))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()


async def _all_of(left):
    import asyncio

    await asyncio.gather(*left, return_exceptions=True)


# == Main thread ==============================================================
# Owns how ordinary tasks run one after the other on the main thread of a child, where
# one can be interrupted even in the middle of a system call.

_FLUSH_SECONDS = 0.5            # for a stream that an app or a task has made


class MainThread:
    """The place of ordinary tasks, while there is one for them."""

    def __init__(self, runs: Runs, wire: ChildEnd, interrupts: Interrupts, crash: int):
        self._runs, self._wire, self._interrupts = runs, wire, interrupts
        self._crash = crash
        # Seconds of CPU that were used when the run began; 0: nobody has looked, for
        # the one before was too short to be worth it.
        self._cpu = 0.0

    def serve(self) -> None:
        """Take frame by frame, until the worker hangs up."""
        lasted = True               # what was before: of the first run, the import
        while True:
            frame = self._wire.receive_now()
            if frame is None or lasted:
                if self._runs.restore_rest():
                    dump_crashes(self._crash)
                self._cpu = time.process_time()
            elif self._cpu:
                self._cpu = 0.0
            if frame is None:
                frame = self._wire.receive()
            if not frame:
                return
            lasted = self._runs.serve(frame, self._call) > SPAWN_SECONDS

    def _call(self, run, args, kwargs):
        """Call the task; a timeout or a cancellation may raise in the middle of it."""
        runs, surroundings = self._runs, self._runs.surroundings
        context = runs.enter() if runs.is_shared else surroundings.context()
        self._interrupts.begin(run)
        try:
            if run.timeout:
                signal.setitimer(signal.ITIMER_REAL, run.timeout)
            value = context.run(run.task.fn, *args, **kwargs)
            if isinstance(value, types.CoroutineType):
                value = context.run(run_coroutine, value)
            return value
        except BaseException:
            if self._cpu and not runs.is_shared:
                run.cpu = round(time.process_time() - self._cpu, 3)
            raise
        finally:
            self._interrupts.allowed = False
            streams = standard_streams()
            if streams != runs.plain_streams:
                self._flush(streams[1:])
            surroundings.restore_main()
            if runs.is_shared:
                runs.leave(is_main=True)
            else:
                surroundings.restore_shared(streams)

    def _flush(self, streams):
        """What an app, or a task, has put in place of our streams may hold output.

        Never raises, and waits only so long: a stream may lead to who does not read.
        """
        raised = self._interrupts.run.raised
        for stream in streams:
            with contextlib.suppress(Exception):
                try:
                    self._interrupts.allowed = True
                    signal.setitimer(signal.ITIMER_REAL, _FLUSH_SECONDS)
                    stream.flush()
                finally:
                    self._interrupts.allowed = False
        self._interrupts.run.raised = raised


# == Threads ==================================================================
# Owns ordinary tasks side by side in one child, each in a thread, and how a time limit
# or a cancellation gets into the middle of one: as an asynchronous exception.  All
# threads read frames from the same socket, so each takes one when it has nothing to
# do; the main thread only minds limits and cancellations.
#
# Such an exception is raised some instructions after it was set, wherever its thread
# is then.  So none is set unless code of the task runs, nor in the middle of a message;
# and whoever ends that makes sure that what was set before has come.

_AGAIN_SECONDS = 0.001          # until one that got lost is raised again
_START_PAUSE = 0.2              # seconds, when there is no thread to be had
_LONGEST_PAUSE = 1e6            # seconds that a lock can be waited for
_INTERRUPTS = (TaskTimeout, TaskCancelled)


@functools.cache
def _setter():
    """set(ident of a thread, class): have one raised there."""
    import ctypes

    set_exception = ctypes.pythonapi.PyThreadState_SetAsyncExc
    set_exception.argtypes = ctypes.c_ulong, ctypes.py_object
    return set_exception


def _settle():
    """Have raised what was set for this thread: each jump back looks for it."""
    for _ in (1, 2, 3):
        pass


class Aim:
    """One thread, as an interruption sees it.

    One run gets only one, but for such as the interpreter has dropped.  So whoever has
    caught that knows that nothing more will come.
    """

    def __init__(self):
        self.ident = own_ident()
        self.run: Any = None        # whose code runs
        self.due = 0.0              # monotonic: its time limit; 0: none
        self.again = 0.0            # … when to raise anew what got lost; 0: not
        self.is_open = False        # code of the task runs, outside of a shelter
        self.was_open = False       # … before a fork
        self._held: BaseException | None = None     # to be raised when it does again
        self._lock = own_lock()     # guards all this, where two threads change it

    def open(self, run: Any) -> None:
        """From now on code of this run may be interrupted."""
        due = time.monotonic() + run.timeout if run.timeout else 0.0
        with self._lock:
            self.due, self.again, self._held = due, 0.0, None
            self.run, self.is_open = run, True

    def close(self, run: Any) -> None:
        """From now on it may not be.  What comes just now has come too late."""
        try:
            with self._lock:
                self.run, self.is_open = None, False
            _settle()
        except _INTERRUPTS:
            self.run, self.is_open = None, False
            run.raised = None

    def interrupt(self, run: Any, exc: BaseException) -> None:
        """From the main thread: raise this in the run, which may have just ended."""
        with self._lock:
            if self.run is run and run.raised is None:
                run.raised = exc
                self._raise(exc)

    def raise_again(self, run: Any) -> None:
        """From there: what was raised where the interpreter drops exceptions."""
        with self._lock:
            self.again = 0.0
            if self.run is run and run.raised is not None:
                self._raise(run.raised)

    def _raise(self, exc):
        if self.is_open:
            _setter()(self.ident, type(exc))
        else:
            self._held = exc

    def shelter(self) -> None:
        """From now on nothing is raised here; what was set is raised now."""
        with self._lock:
            self.is_open = False
        _settle()

    def unshelter(self, before: bool) -> None:
        """Raise what fell into the time since, if code of the task goes on.

        `before`: is_open, as it was before shelter().
        """
        held = None
        with self._lock:
            self.is_open = before
            if before:
                held, self._held = self._held, None
        if held is not None:
            raise held

    def before_fork(self) -> None:
        """A shelter in which nothing at all is raised: the interpreter drops that."""
        self.was_open = self.is_open
        try:
            self.shelter()
        except _INTERRUPTS as exc:
            self.is_open, self._held = False, exc

    def forget(self) -> None:
        """In the forked process: the main thread may have had the lock."""
        self._lock = own_lock()

    def after_fork(self) -> None:
        """In the process that has forked.  What fell into it is raised a bit later."""
        with self._lock:
            self.is_open = self.was_open
            if self._held is not None and self.was_open:
                self._held, self.again = None, time.monotonic() + _AGAIN_SECONDS


class Threads:
    """Up to `size` threads that run tasks.  To be made in the main thread."""

    def __init__(self, runs: Runs, wire: ChildEnd, interrupts: Interrupts, size: int):
        self._runs, self._wire, self._size = runs, wire, size
        self._aims: dict[int, Aim] = {}     # by ident of the thread
        self._lock = own_lock()             # guards the numbers below
        self._alive = 0                     # threads
        self._idle = 0                      # … that wait for a frame
        self._is_over = False               # there are no more frames
        self._news = own_lock()             # released: there is something to mind
        self._wanted: collections.deque = collections.deque()   # ids, to be cancelled
        self._next_due = 0.0                # monotonic: the main thread looks then
        self._early = Early()
        self._unraisable = sys.unraisablehook
        interrupts.others.append(self._cancel)
        runs.send = self._sheltered(wire.send)

    def serve(self) -> None:
        """Mind what runs in the threads, until the worker hangs up."""
        self._news.acquire()
        sys.unraisablehook = self._on_unraisable
        # Before Python 3.12 a new thread has the ident of its maker for a moment, and
        # would get what is raised in that.
        start: Any = self._sheltered(threading.Thread.start)
        threading.Thread.start = start      # type: ignore[method-assign]
        _setter()
        while not self._is_over or self._alive:
            while not self._idle and self._alive < self._size and not self._is_over:
                if not self._grow():
                    break
            if not self._alive:
                own_sleep(_START_PAUSE)
                continue
            now = time.monotonic()
            self._mind(now)
            pause = min(self._next_due - now, _LONGEST_PAUSE)
            self._news.acquire(True, max(0.0, pause))

    def _tell(self):
        with contextlib.suppress(RuntimeError):         # it was told already
            self._news.release()

    def _cancel(self, run_ids):
        """In a signal handler."""
        self._wanted.extend(run_ids)
        self._tell()

    def _mind(self, now):
        """Carry out what is due, and note when the next thing will be."""
        self._next_due, due = math.inf, math.inf    # whoever adds one now tells us
        wanted = set()
        while self._wanted:
            wanted.add(self._wanted.popleft())
        if wanted:
            self._early.note(wanted, now)       # before we look, as who begins does
        for aim in list(self._aims.values()):
            run = aim.run
            if run is None:
                continue
            if run.of[0] in wanted:
                self._early.take(run.of[0], now)
                aim.interrupt(
                    run, TaskCancelled(f"task {run.of[0]} is being cancelled"))
            if aim.due and aim.due <= now:
                aim.interrupt(run, TaskTimeout("the time limit is reached"))
            elif aim.due and run.raised is None:
                due = min(due, aim.due)
            if aim.again and aim.again <= now:
                aim.raise_again(run)
            elif aim.again:
                due = min(due, aim.again)
        self._next_due = due

    def _grow(self):
        """One more thread.  False when there is none to be had."""
        with self._lock:
            self._alive += 1
            self._idle += 1
        try:
            start_thread(self._work, "task")
            return True
        except (RuntimeError, MemoryError):
            with self._lock:
                self._alive -= 1
                self._idle -= 1
            return False

    def _work(self):
        """The life of a thread."""
        try:
            aim = self._aims[own_ident()] = Aim()
            TaskStream.places.add(aim.ident)
            call = functools.partial(self._call, aim)
            while frame := self._wire.receive():
                with self._lock:
                    self._idle -= 1
                    is_short = not self._idle and self._alive < self._size
                if is_short:
                    self._tell()
                self._runs.serve(frame, call)
                with self._lock:
                    self._idle += 1
            del self._aims[aim.ident]
        except BaseException:
            self._runs.die()
        self._is_over = True
        with self._lock:
            self._alive -= 1
        self._tell()

    def _call(self, aim, run, args, kwargs):
        """Call the task in this thread.

        What is set for it is raised within _within(), or not at all: see Aim.
        """
        context = self._runs.enter()
        try:
            return self._within(aim, context, run, args, kwargs)
        except _INTERRUPTS as exc:
            if not exc.args and run.raised is not None:
                exc.args = run.raised.args
            raise
        finally:
            self._early.end(run.of[0])
            self._runs.surroundings.restore_thread()
            self._runs.leave()

    def _within(self, aim, context, run, args, kwargs):
        try:
            aim.open(run)
            if self._early.take(run.of[0], time.monotonic()):
                self._cancel(run.of[:1])
            elif aim.due and aim.due < self._next_due:
                self._tell()
            value = context.run(run.task.fn, *args, **kwargs)
            if isinstance(value, types.CoroutineType):
                value = context.run(run_coroutine, value)
            return value
        finally:
            aim.close(run)

    def _sheltered(self, call):
        """The same function, which no interruption cuts."""
        @functools.wraps(call)
        def call_sheltered(argument):
            aim = self._aims.get(own_ident())
            if aim is None:
                return call(argument)
            before = aim.is_open
            try:
                aim.shelter()
                return call(argument)
            finally:
                aim.unshelter(before)

        return call_sheltered

    def _on_unraisable(self, args):
        """What fell into a finalizer, or a hook of os.fork(), is raised again."""
        aim = self._aims.get(own_ident())
        if aim is None or args.exc_type not in _INTERRUPTS:
            self._unraisable(args)
        else:
            aim.again = time.monotonic() + _AGAIN_SECONDS
            self._tell()

    def before_fork(self) -> None:
        """In the thread that is about to fork."""
        aim = self._aims.get(own_ident())
        if aim is not None:
            aim.before_fork()

    def in_fork(self) -> None:
        """In the forked process."""
        aim = self._aims.get(own_ident())
        if aim is not None:
            aim.forget()

    def after_fork(self) -> None:
        """In the process that has forked."""
        aim = self._aims.get(own_ident())
        if aim is not None:
            aim.after_fork()
            self._tell()


# == Carried runs =============================================================
# Owns one run of an `async def` task on an event loop that it shares: each step of its
# code, how it is interrupted, and what it starts there.  That is its own, by a context
# variable: nobody else cancels it, and it ends with the run.

LEFT_SECONDS = 1.0          # for what a run has left to end, once it is cancelled
_LEFT_IN_GRACE = 0.25       # … where its child is to be killed in a moment


class Carried:
    """A run on the loop, and what it has started there."""

    __slots__ = ("run", "root", "tasks", "generators", "limit", "fate", "is_open",
                 "has_begun")

    def __init__(self, run: Running):
        self.run = run
        self.root: Any = None           # the asyncio task that carries it
        self.tasks: weakref.WeakSet = weakref.WeakSet()         # all others
        self.generators: weakref.WeakSet = weakref.WeakSet()
        self.limit: Any = None          # the timer of its time limit
        self.fate: BaseException | None = None      # what a part of it has raised
        self.is_open = False            # code of the task runs: may be cancelled
        self.has_begun = False

    def interrupt(self, exc: BaseException) -> None:
        """Have it end for this reason, unless it does so for another."""
        if self.run.raised is None and self.fate is None:
            self.run.raised = exc
            self.cancel()

    def cancel(self) -> None:
        """Before it has begun, call() sees why."""
        if self.is_open:
            self.root.cancel_at_last()

    async def call(self, runs: Runs) -> tuple:
        """Call the task, and wait for it.  Returns kind and value of the answer."""
        import asyncio

        run, self.has_begun = self.run, True
        try:
            try:
                if run.task is None:
                    return UNKNOWN, b""
                self.is_open = True
                if run.raised is not None or self.fate is not None:
                    raise asyncio.CancelledError
                if run.timeout:
                    self.limit = asyncio.get_running_loop().call_later(
                        run.timeout, self.interrupt,
                        TaskTimeout("the time limit is reached"))
                args, kwargs = decode(run.text or runs.app.store.args(run.of[0]))
                result = run.task.fn(*args, **kwargs)
                if isinstance(result, types.CoroutineType):
                    result = await result
            finally:
                self.is_open = False
                if self.limit is not None:
                    self.limit.cancel()
            text = runs.encoded(result)
        except BaseException as exc:
            if runs.is_fork:
                runs.leave_fork(exc)
            return runs.failed(run, self._reason(exc))
        if runs.is_fork:
            runs.leave_fork(None)
        if self.fate is not None:
            return runs.failed(run, self.fate)
        return SUCCEEDED, text

    def _reason(self, exc):
        """Why it has ended: the cancellation of its asyncio task is only how."""
        import asyncio

        if self.fate is not None:
            return self.fate
        if self.run.raised is not None and isinstance(exc, asyncio.CancelledError):
            return self.run.raised.with_traceback(exc.__traceback__)
        return exc

    def patience(self) -> float:
        """Seconds that its end may wait for what it has left."""
        return LEFT_SECONDS if self.run.raised is None else _LEFT_IN_GRACE

    async def leave_nothing(self, until: float) -> None:
        """End what it has started and left, if that lets itself be ended by then.

        Called anew when somebody cancels the run meanwhile, as what is left may do.
        """
        import asyncio

        while (rest := until - time.monotonic()) > 0:
            left = {task for task in self.tasks if not task.done()}
            if not left and not self.generators:
                return
            for task in left:
                task.cancel()
            if not left:
                left = {asyncio.ensure_future(_closed(each))
                        for each in list(self.generators)}
                self.generators.clear()
            done, _ = await asyncio.wait(left, timeout=rest)
            for task in done:
                if not task.cancelled():
                    task.exception()            # so that nobody misses it

    def has_left(self) -> bool:
        """True when some of it goes on."""
        return any(not task.done() for task in self.tasks)


@functools.cache
def _task_class():
    import asyncio

    class Task(asyncio.Task):
        """An asyncio task of a run: only code of that, or of no run, can cancel it.

        asyncio.all_tasks() shows it to all runs on the loop, and to cancel what that
        shows is a usual way to end a program.
        """

        carried: Any = None
        is_passed_on = False        # a cancellation, to what a cancelled one waits for

        def cancel(self, *args: Any, **options: Any) -> bool:
            carried, caller = self.carried, running.get()
            if caller in in_flight and caller is not carried.run.current \
                    and not Task.is_passed_on:
                return False
            if self is carried.root and not carried.has_begun:
                # asyncio would never call it: then nobody would answer.
                carried.fate = carried.fate or asyncio.CancelledError(*args)
                return True
            return self.cancel_at_last(*args, **options)

        def cancel_at_last(self, *args: Any, **options: Any) -> bool:
            before, Task.is_passed_on = Task.is_passed_on, True
            try:
                return super().cancel(*args, **options)
            finally:
                Task.is_passed_on = before

    return Task


def task_of(carried: Carried, coroutine: Any, loop: Any, watch: Any, runs: Runs,
            **options: Any) -> Any:
    """An asyncio task that is a part of this run: the first one carries it."""
    steps = _Steps(coroutine, carried, watch, runs)
    task = _task_class()(steps, loop=loop, **options)
    task.carried = carried
    if carried.root is None:
        carried.root = task
    else:
        carried.tasks.add(task)
    return task


class _Steps(Coroutine):
    """The coroutine of an asyncio task, of which every step is known to be of a run."""

    def __init__(self, coroutine: Any, carried: Carried, watch: Any, runs: Runs):
        self._coroutine, self._carried = coroutine, carried
        self._watch, self._runs = watch, runs

    def __getattr__(self, name):
        return getattr(self._coroutine, name)       # such as cr_frame

    def __await__(self):
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        return self._step(self._coroutine.send, value)

    def throw(self, *exc: Any) -> Any:      # type: ignore[override]
        return self._step(self._coroutine.throw, *exc)

    def close(self) -> None:
        self._coroutine.close()

    def _step(self, go, *args):
        watch, runs = self._watch, self._runs
        before, watch.step = watch.step, (self._carried, time.monotonic())
        try:
            value = go(*args)
        except BaseException as exc:
            if runs.is_fork:
                runs.leave_fork(None if isinstance(exc, StopIteration) else exc)
            if isinstance(exc, (SystemExit, KeyboardInterrupt)):
                raise self._end_run(exc) from exc       # not the loop
            raise
        finally:
            watch.step = before
        if runs.is_fork:
            runs.printer.print(
                "a process that a coroutine has forked cannot await\n", 2)
            runs.leave_fork(SystemExit(1))
        return value

    def _end_run(self, exc):
        """A part of a run wants the whole to end, as it would in a process alone."""
        import asyncio

        if self._carried.fate is None:
            self._carried.fate = exc
            self._carried.cancel()
        return asyncio.CancelledError()


def is_step(frame: types.FrameType) -> bool:
    """True for what calls code of a run, in a stack of the loop's thread."""
    return frame.f_code is _Steps._step.__code__


async def _closed(generator):
    await generator.aclose()


def executor_for(streams: Sequence[TaskStream]) -> Any:
    """For loop.run_in_executor(): its calls work for whoever has submitted them."""
    from concurrent.futures import ThreadPoolExecutor

    own_calls(streams)

    class Executor(ThreadPoolExecutor):
        def __init__(self):
            super().__init__(thread_name_prefix="asyncio")
            self._max_workers = min(32, (os.cpu_count() or 1) + 4)      # as by itself
            self._calls = {}            # by run: futures of those that go on
            self.was_shut = False       # by a task, through its loop

        def submit(self, fn, /, *args, **kwargs):
            future = super().submit(fn, *args, **kwargs)
            calls = self._calls.setdefault(current_task(), set())
            calls.add(future)
            future.add_done_callback(calls.discard)
            return future

        def calls_of(self, own):
            return list(self._calls[own]) if own in self._calls else []

        def leave(self, own):
            """This run has ended.  True when a call of it goes on.

            Another thread comes in place of its own: or others would wait for it.
            """
            if own not in self._calls:
                return False
            left = [call for call in self._calls.pop(own)
                    if not (call.cancel() or call.done())]
            for _ in left:
                self._max_workers += 1
                self._adjust_thread_count()
            return bool(left)

        def shutdown(self, *_, **__):
            """Not at once: others need it."""
            self.was_shut = True

        def end(self):
            super().shutdown(wait=False)

    return Executor()


# == Coroutines ===============================================================
# Owns the one event loop of a child, in a thread of its own, and which `async def`
# tasks are on it; says who blocks it.  What a run does to the loop itself is undone,
# and where it leaves what does not end the child asks to be replaced.

_LAG_SECONDS = 1.0          # a step that takes so long blocks the others


class _Watch:
    """Says, while it lasts, that a run blocks the loop.  From a thread of its own.

    It looks once a second, and only while there are runs.
    """

    def __init__(self, carried: dict, say: Callable):
        self.step: Any = None       # (run on the loop, since) now
        self._carried, self._say = carried, say
        self._loop_thread = 0
        self._wake = own_lock()
        self._wake.acquire()
        self._is_asleep = False

    def start(self) -> None:
        """In the thread of the loop.  Without a thread to be had there is no watch."""
        import traceback  # noqa: F401 - now, not while somebody blocks

        self._loop_thread = own_ident()
        with contextlib.suppress(RuntimeError, MemoryError):
            own_start(self._main, ())

    def wake(self) -> None:
        """There is a run again."""
        if self._is_asleep:
            self._is_asleep = False
            with contextlib.suppress(RuntimeError):
                self._wake.release()

    def _main(self):
        told = None
        while True:
            step, pause = self.step, _LAG_SECONDS
            if step is not None and step is not told:
                lasted = time.monotonic() - step[1]
                pause = max(0.0, _LAG_SECONDS - lasted)
                if not pause:
                    told, pause = step, _LAG_SECONDS
                    self._tell(step, lasted)
            self._is_asleep = not self._carried
            if self._carried:               # also now that we say that we are not
                self._is_asleep = False
                self._wake.acquire(True, pause)
            else:
                self._wake.acquire()

    def _tell(self, step, lasted):
        import traceback

        frame, found = sys._current_frames().get(self._loop_thread), []
        while frame is not None and not is_step(frame):
            found.append((frame, frame.f_lineno))
            frame = frame.f_back
        # What calls the task is ours; what it calls may be so: AsyncResult.get().
        while found and found[-1][0].f_code.co_filename == __file__:
            found.pop()
        stack = "".join(traceback.StackSummary.extract(reversed(found)).format())
        if self.step is step:               # else it was the stack of another
            self._say(LAGGED, [lasted, stack[-TRACEBACK_CHARS:]], step[0].run.of)


@functools.cache
def _is_debug():
    """Whether asyncio has a new loop in debug mode, by the environment of our start."""
    return sys.flags.dev_mode or (not sys.flags.ignore_environment
                                  and bool(os.environ.get("PYTHONASYNCIODEBUG")))


async def _wait_for(calls, until):
    """Wait for what a run has in threads, as asyncio.run() does, but not for ever."""
    import asyncio

    rest = until - time.monotonic()
    if rest > 0:
        await asyncio.wait([*map(asyncio.wrap_future, calls)], timeout=rest)


class Coroutines:
    """The loop of a child, and its thread; made when the first run comes."""

    def __init__(self, runs: Runs, wire: ChildEnd, interrupts: Interrupts, places: int):
        self._runs, self._wire, self._interrupts = runs, wire, interrupts
        self._places = places
        self._frames = wire.beside.fileno() if wire.beside is not None else -1
        self._carried: dict[Any, Carried] = {}     # what is in flight
        self._watch = _Watch(self._carried, runs.say)
        self._loop: Any = None
        self._executor: Any = None
        self._is_spent = False      # the worker knows that we are to be replaced
        self._early = Early()
        self._context = contextvars.copy_context()      # of no run
        self._listens = False       # the loop tells of frames
        self._is_over = False       # there are no more
        self._ended = own_lock()    # released at the end of the thread

    def start(self) -> None:
        """Have a thread wait for the first frame."""
        self._ended.acquire()
        self._interrupts.others.append(self._cancel_soon)
        start_thread(self._main, "coroutines")

    def join(self) -> None:
        """Wait for the end of the thread: the worker has hung up."""
        self._ended.acquire()

    def _main(self):
        TaskStream.places.add(own_ident())
        try:
            while frame := self._wire.receive_beside(wait=True):
                try:
                    self._make_loop()
                    break
                except OSError as exc:          # of descriptors: fails as its own would
                    run = self._runs.begin(frame)
                    self._runs.end(run, *self._runs.failed(run, exc))
            if frame:
                self._loop.call_soon(self._begin, frame)
                self._run_loop()
                self._close_loop()
        except BaseException:
            self._runs.die()
        self._ended.release()

    def _make_loop(self):
        import asyncio

        if selectors.DefaultSelector is OwnSelector:
            self._loop = asyncio.new_event_loop()
        else:               # of gevent, which waits in greenlets
            self._loop = asyncio.SelectorEventLoop(OwnSelector())
        self._executor = executor_for(self._runs.printer.streams)
        self._restore_loop()
        self._loop.add_reader(self._wire.messages.fileno(), self._hear)
        self._listen()
        self._watch.start()

    def _restore_loop(self):
        """Undo what a run has done to the loop that all share."""
        loop = self._loop
        loop.set_default_executor(self._executor)
        if loop.get_task_factory() != self._make_task:
            loop.set_task_factory(self._make_task)
        if self._executor.was_shut:
            with contextlib.suppress(AttributeError):       # of uvloop
                loop._executor_shutdown_called = False
            self._executor.was_shut = False
        if not self._carried:
            loop.set_exception_handler(None)
            if loop.get_debug() != _is_debug():
                loop.set_debug(_is_debug())

    def _run_loop(self):
        while not self._is_over or self._carried:
            self._loop.call_soon(self._own_generators)
            try:
                self._loop.run_forever()
            except (SystemExit, KeyboardInterrupt) as exc:      # of a callback
                if self._runs.is_fork:
                    self._runs.leave_fork(exc)
                text = describe_exception(exc)["traceback"]
                self._runs.printer.print(text, 2)

    def _close_loop(self):
        import asyncio

        loop = self._loop
        left = asyncio.all_tasks(loop)
        for each in left:
            each.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=LEFT_SECONDS))
        with contextlib.suppress(asyncio.TimeoutError):
            loop.run_until_complete(
                asyncio.wait_for(loop.shutdown_asyncgens(), LEFT_SECONDS))
        loop.close()
        self._executor.end()

    def _own_generators(self):
        """Know whose an asynchronous generator is, from its first step."""
        hooks: Any = sys.get_asyncgen_hooks()

        def first_step(generator):
            carried = self._carried.get(running.get())
            if carried is not None:
                carried.generators.add(generator)
            hooks.firstiter(generator)

        sys.set_asyncgen_hooks(firstiter=first_step)

    def _make_task(self, loop, coroutine, **options):
        """The task factory of the loop."""
        import asyncio

        carried = self._carried.get(running.get())
        if carried is None:
            return asyncio.Task(coroutine, loop=loop, **options)
        return task_of(carried, coroutine, loop, self._watch, self._runs, **options)

    def _listen(self):
        """Have the loop tell of frames while there is a place."""
        wanted = not self._is_over and len(self._carried) < self._places
        if wanted and not self._listens:
            self._context.run(self._loop.add_reader, self._frames, self._take)
        elif self._listens and not wanted:
            self._loop.remove_reader(self._frames)
        self._listens = wanted

    def _take(self):
        while len(self._carried) < self._places:
            frame = self._wire.receive_beside(wait=False)
            if frame is None:
                return
            if not frame:
                self._is_over = True
                break
            self._begin(frame)
        self._listen()
        self._stop_at_end()

    def _stop_at_end(self):
        if self._is_over and not self._carried:
            self._loop.stop()

    def _begin(self, frame):
        try:
            run = self._runs.begin(frame)
            carried = self._carried[run.current] = Carried(run)
            context = self._runs.enter()
            context.run(self._start, carried)
            self._watch.wake()
            if self._early.take(run.of[0], time.monotonic()):
                self._cancel({run.of[0]})
        except BaseException:
            self._runs.die()

    def _start(self, carried):
        running.set(carried.run.current)
        self._make_task(self._loop, self._carry(carried))   # whatever the factory is

    async def _carry(self, carried):
        """All of a run: its call, what it has left, its answer."""
        runs, run = self._runs, carried.run
        kind, value = await carried.call(runs)
        until = time.monotonic() + carried.patience()
        try:
            while True:
                try:
                    if carried.tasks or carried.generators:
                        await carried.leave_nothing(until)
                    calls = self._executor.calls_of(run.current)
                    if calls and run.raised is None:
                        await _wait_for(calls, until)
                    break
                except BaseException as exc:    # somebody has kept this task, too
                    if runs.is_fork:
                        runs.leave_fork(exc)
            self._say_what_is_left(carried)
            runs.leave()
            runs.end(run, kind, value)
            del self._carried[run.current]
            self._restore_loop()
            self._early.end(run.of[0])
            self._listen()
            self._stop_at_end()
        except BaseException:
            runs.die()

    def _say_what_is_left(self, carried):
        """Ask for another child in our place, once, if a run has left for good …"""
        run, is_busy = carried.run, self._executor.leave(carried.run.current)
        if not (is_busy or carried.tasks or self._executor.was_shut):
            return
        found = "asyncio tasks that do not end when they are cancelled" \
            if carried.has_left() else "calls in threads that do not end" \
            if is_busy else "its event loop without an executor" \
            if self._executor.was_shut else ""
        if found and not self._is_spent:
            self._is_spent = True
            name = run.current.name
            self._runs.say(SPENT, f"a run of {name} has left {found}", run.of)

    def _hear(self):
        """The worker has named runs that are to be cancelled."""
        wanted = self._wire.wanted()
        if wanted is None:
            self._loop.remove_reader(self._wire.messages.fileno())
            return
        wanted -= self._cancel(wanted)
        if wanted:
            self._interrupts.pass_on(wanted)

    def _cancel_soon(self, run_ids):
        """In a signal handler of the main thread."""
        if self._loop is None:          # it is being made for this very run, perhaps
            self._early.note(run_ids, time.monotonic())
            return
        with contextlib.suppress(RuntimeError):                     # it is closed
            self._loop.call_soon_threadsafe(self._cancel, run_ids)

    def _cancel(self, run_ids):
        """Returns the ids of those that are here."""
        self._early.note(run_ids, time.monotonic())
        found = set()
        for carried in list(self._carried.values()):
            number = carried.run.of[0]
            if number in run_ids:
                found.add(number)
                self._early.take(number, 0.0)
                carried.interrupt(TaskCancelled(f"task {number} is being cancelled"))
        return found


# == Child ====================================================================
# Owns the subprocess that runs tasks: how it comes to have the app, alone or from a
# nursery, which of the three above serve its frames, and how it ends.  Each takes a
# frame only when it has a place for that run, and answers with one message.  Nothing
# that happens in a task can reach past this process.  It knows the app and the
# frames, nothing of claims; of retries only whether an error is in `retry_for`.


def child_spec(app_spec: str, db: str, settings: types.SimpleNamespace,
               has_async: bool = False) -> ChildSpec:
    """The ChildSpec of all children of this process; each adds its own descriptors.

    One whose app has no async task (`has_async`) needs no event loop.
    """
    names = ("durability", "busy_timeout", "max_payload", "allow_network_fs",
             "log_level")
    values = {name: getattr(settings, name) for name in names}
    return ChildSpec(__name__, app_spec, sys.path, os.getpid(), 0, 0, 0, 0,
                     {"db": db, **values}, threads=settings.threads,
                     coroutines=settings.coroutines if has_async else 0)


SLOW_SECONDS = 10.0            # an import of the app that lasts so long is said


def is_slow(since: float, at: float, read_stack: Callable[[], str]) -> tuple[bool, str]:
    """(whether to say of an import that it is slow, where it is).

    The stack comes half that time after the import has begun, which is later than the
    process has: on a busy machine it is waited for.
    """
    stack = read_stack() if at - since >= SLOW_SECONDS else ""
    return bool(stack) or at - since >= 2 * SLOW_SECONDS, stack


class Stage:
    """What is there before an app is imported: streams, and the last exit handler."""

    def __init__(self, say: Callable = nobody):
        self.printer = Printer(say)
        self.streams: tuple = ()        # ours
        self.app: Any = None            # once it is imported
        self.at_last: Callable = nobody         # the end of the exit handlers
        self._originals: tuple = ()     # what our streams stand in for

    def set(self) -> None:
        """Have what the app prints; also by sys.__stdout__.

        "sys.stdout = sys.__stdout__" ends a redirection.
        """
        atexit.register(self._let_go)       # the first to come is the last to go
        self._originals = sys.stdout, sys.stderr
        for stream in self._originals:
            stream.flush()
        out, err = self.printer.streams
        sys.stdout = sys.__stdout__ = out           # type: ignore[assignment,misc]
        sys.stderr = sys.__stderr__ = err           # type: ignore[assignment,misc]
        self.streams = standard_streams()

    def _let_go(self):
        """At the very end: what the app has made ends with it, so files are flushed.

        The hooks at a fork, and the handlers, hold us for longer than that.
        """
        for app in (self.app, default_app):
            if app is not None:
                app.tasks.clear()
        self.at_last()


class Child:
    """The child's side."""

    def __init__(self, spec: ChildSpec, stage: Stage | None = None):
        self.spec = spec
        self.wire = ChildEnd(spec.frames, spec.messages, spec.beside)
        self.interrupts = Interrupts(self.wire)
        self.stage = stage or Stage()
        self.runs = Runs(self.wire, spec, self.stage.printer, self.interrupts.send)
        self.threads: Any = None            # that run tasks, if there are several

    def main(self) -> None:
        """Prepare, import the app, then serve; return for an orderly exit."""
        import gc

        have_fresh_signals()
        self._prepare()
        self.stage.set()
        with self._telling_what_fails():
            # Written before the worker looks for it, which counts from our start.
            with stack_when_slow(self.spec.crash, SLOW_SECONDS / 2):
                self.runs.app = self.stage.app = load_app(self.spec.app)
            self.runs.app.override(**self.spec.settings)
        gc.freeze()         # what is imported will never be garbage
        self._live()

    def go_on(self) -> None:
        """The same in a process that was forked when the app was imported."""
        self._prepare()
        self.runs.app = self.stage.app
        self._live()

    def _live(self):
        import gc

        with self._telling_what_fails():
            coroutines = self._get_ready()
        self.runs.say(READY, list(self.runs.app.tasks))
        self._work(coroutines)
        gc.unfreeze()               # or open files would not be flushed at the exit
        self.interrupts.run = None  # the same: it holds the task
        self.wire.keep_open()

    def _get_ready(self):
        """Do what precedes the first frame.  Returns the Coroutines, or None."""
        dump_crashes(self.spec.crash)
        self.runs.plain_streams = self.stage.streams
        self.runs.surroundings = Surroundings(self.interrupts.handlers)
        self.runs.surroundings.restore(standard_streams())
        take_log_lines(self.runs.app.settings.log_level)
        own_threads(self.stage.printer.streams)
        common = self.runs, self.wire, self.interrupts
        if self.spec.threads > 1:       # from now on cancellations are heard
            self.threads = Threads(*common, self.spec.threads)
        if self.spec.beside < 0:
            return None
        coroutines = Coroutines(*common, self.spec.coroutines)
        coroutines.start()
        return coroutines

    def _work(self, coroutines):
        """Run tasks, of each kind in its place, until the worker hangs up."""
        if self.threads:
            self.threads.serve()
        else:
            MainThread(self.runs, self.wire, self.interrupts, self.spec.crash).serve()
        if coroutines:
            coroutines.join()

    def _prepare(self):
        spec = self.spec
        die_with_parent(spec.parent)
        offer_to_die()
        dump_crashes(spec.crash)
        for number, handler in self.interrupts.handlers.items():
            set_signal(number, handler)
        # Not by Python code, into which an exception could fall.
        os.register_at_fork(
            after_in_child=functools.partial(setattr, self.runs, "is_fork", True))
        os.register_at_fork(
            before=self._before_fork, after_in_child=self._in_fork,
            after_in_parent=self._after_fork,
        )
        for name in CHILD_ENDS:
            with contextlib.suppress(OSError):      # there is none, or it is closed
                os.set_inheritable(getattr(spec, name), False)
        self.stage.printer.speak_by(self.runs.say)

    @contextlib.contextmanager
    def _telling_what_fails(self):
        """What fails in this block keeps us from being ready: say so and end."""
        try:
            yield
        except BaseException as exc:
            # A lock that is taken will be so for as long as the worker lives.
            lacks = is_lack(exc) and not isinstance(exc, BlockingIOError)
            trace = describe_exception(exc)["traceback"]
            self.runs.say(LACKING if lacks else BROKEN, trace)
            os._exit(1)

    def _before_fork(self):
        if self.threads:
            self.threads.before_fork()
        self.interrupts.before_fork()

    def _after_fork(self):
        self.interrupts.after_fork()
        if self.threads:
            self.threads.after_fork()

    def _in_fork(self):
        """In a process that a task has forked: be to it as a program of its own.

        Else terminate() would not end it, and multiprocessing would wait for ever.
        """
        import faulthandler

        faulthandler.unregister(signal.SIGUSR2)
        self.interrupts.leave()
        self.runs.printer.leave()
        self.runs.forget()
        if self.threads:
            self.threads.in_fork()
        if self.runs.surroundings:
            self.runs.surroundings.leave()
        self.wire.close()
        self.runs.begun.leave()
        self.interrupts.after_fork()


# == Nursery ==================================================================
# Owns the process that imports the app once and has a worker's children: it forks
# them where that is safe, else it executes them, and each imports the app.  It says
# what the app is, who was born and who has died, and when its worker is gone it
# kills the groups of all of them.  Knows nothing of tasks that run.
#
# A process whose parent has not waited for it keeps its number, so only the parent
# can send a signal to it, or to its group, and never hit a stranger.

_REQUEST_BYTES = 1 << 16
_ORPHAN_GRACE = 0.25        # seconds for what the app does at the end of a nursery
                            # whose worker was killed; and twice that in all
START_CODE = (
    "import importlib, json, sys; name, spec = json.loads(sys.argv.pop()); "
    "sys.path[:] = spec[2]; "
    "getattr(importlib.import_module(spec[0]), name)(spec)"
)


class NurserySpec(NamedTuple):
    """What a nursery must know from the start; passed to it as JSON."""

    module: str         # the name this file is imported by
    app: str            # MODULE[:APP]
    path: list          # sys.path
    parent: int         # pid of the worker
    requests: int       # descriptor to read requests from: JSON, with descriptors
    reports: int        # descriptor to write reports to: lines of JSON
    crash: int          # descriptor for the Python stack of a crash


def run_nursery(spec: Sequence) -> None:
    """The life of a nursery; and then that of each child that is forked from it.

    A forked child has the hash seed of its siblings; all else that is random differs.
    """
    child = _Nursery(NurserySpec(*spec)).live()
    if child is not None:
        child.go_on()


def run_child(spec: Sequence) -> None:
    """The life of a child, until its worker closes the socket or dies."""
    Child(ChildSpec(*spec)).main()


def start_argv(name: str, spec: ChildSpec | NurserySpec) -> list[str]:
    """The command that calls one of the two above.

    An import looks in no folder whose name is not text, so nothing is lost.
    """
    path = [folder for folder in spec.path if isinstance(folder, str)]
    return [*interpreter(), "-c", START_CODE,
            json.dumps([name, spec._replace(path=path)])]


def _print_here(_, text, __):
    write_all(1, text.encode("utf-8", "backslashreplace"))


class _Nursery:
    """The nursery's side."""

    def __init__(self, spec: NurserySpec):
        self._spec = spec
        self._requests = own_socket(spec.requests)
        self._reports = own_socket(spec.reports)
        self._stage = Stage(_print_here)
        self._bell, self._ringer = socket_pair()    # rings when a child may be dead
        self._pids: dict[int, int] = {}     # of children that live: their numbers
        # Of signals, what the app has set; ours are in their place.
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1                   # descriptor: the same
        self._mask: Any = ()                # blocked signals: the same
        self._outputs = [os.fstat(fd) for fd in (1, 2)]
        self._has_forked = False
        self._is_dismissed = False          # by the worker, which lives

    def live(self) -> Child | None:
        """Import the app, then do what the worker asks for, until it is gone.

        In a forked process this returns what that is.
        """
        self._prepare()
        before = open_files()
        if not self._import():
            self._end(1)
            return None
        # From now on we have to clean up after the worker, also if we are stopped then.
        set_death_signal(signal.SIGCONT)
        self._take_signals()
        self._report("app", Registry.of(self._stage.app, self._spec.app).catalog(),
                     why_not_fork(before))
        child = self._serve()
        if child is None:
            self._end(0)
        return child

    def _prepare(self):
        # Should it never end: an import must not outlive a worker that is killed.
        has_group = dies_with(self._reports, True)
        die_with_parent(self._spec.parent)
        if has_group:       # else it would die alone, before what it has started
            set_death_signal(0)
        dump_crashes(self._spec.crash)
        have_fresh_signals()
        for number in (signal.SIGTERM, signal.SIGINT):
            set_signal(number, nobody)      # a process manager sends them to all
        for fd in self._spec[4:]:
            os.set_inheritable(fd, False)
        for end in (self._bell, self._ringer):
            end.setblocking(False)
        # Or our end would not be seen while something lives that the import forks.
        os.register_at_fork(after_in_child=self._let_go)
        # What children will need: loaded once, and before an app can change it.
        import mmap     # noqa: F401

        interpreter()
        self._stage.set()

    def _let_go(self):
        """In a forked process, of whatever kind: speak to the worker no more."""
        for end in (self._requests, self._reports):
            end.close()

    def _import(self):
        """False, and said, when there is no app."""
        try:
            # Written before the worker looks for it, which counts from our start.
            with stack_when_slow(self._spec.crash, SLOW_SECONDS / 2):
                self._stage.app = import_app(self._spec.app)
        except OtherCopy as other:
            self._start_anew(other.name)
        except BaseException as exc:
            cause = exc.__context__ if isinstance(exc, Problem) else exc
            # A lock that is taken will be so for as long as the worker lives.
            lacks = is_lack(cause or exc) and not isinstance(cause, BlockingIOError)
            self._report("failed", str(exc), lacks, isinstance(exc, UsageError))
            return False
        if self._requests.fileno() < 0:     # forked by the import, and come back
            os._exit(1)
        for app in {self._stage.app, default_app}:
            app.configure()         # closes its database: that is for the children
        self._stage.printer.end_run()
        functions = [task.fn for task in self._stage.app.tasks.values()]
        if any(map(is_coroutine_function, functions)):
            import asyncio      # noqa: F401 - once, not in each child
        import logging          # noqa: F401 - the same; not before an app may patch it
        return True

    def _start_anew(self, module):
        """The app uses this file by another name: be that."""
        spec = self._spec._replace(module=module, path=sys.path)
        for fd in spec[4:]:
            os.set_inheritable(fd, True)
        os.execv(sys.executable, start_argv("run_nursery", spec))

    def _take_signals(self):
        signal.setitimer(signal.ITIMER_REAL, 0)
        self._mask = signal.pthread_sigmask(signal.SIG_SETMASK, ())
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD
        self._handlers = {number: _signal.getsignal(number) for number in numbers}
        for number in numbers:
            set_signal(number, nobody)
        self._wakeup = signal.set_wakeup_fd(self._ringer.fileno(),
                                            warn_on_full_buffer=False)

    def _report(self, *what):
        """Tell the worker; one that is gone is noticed elsewhere."""
        dies_with(self._reports, False)
        with contextlib.suppress(OSError):
            self._reports.sendall(json.dumps(what).encode() + b"\n")

    def _serve(self):
        """Do what is asked for; return None when nobody can ask any more."""
        poll = own_poll()
        for end in (self._requests, self._bell):
            poll.register(end.fileno(), select.POLLIN)
        poll.register(self._reports.fileno(), 0)        # only its end is of interest
        while True:
            ready = [fd for fd, _ in poll.poll()]
            if self._reports.fileno() in ready:
                return None
            if self._requests.fileno() in ready:
                data, fds = receive_with(self._requests, _REQUEST_BYTES)
                if not data:
                    return None
                child = self._do(json.loads(data), fds)
                if child is not None:
                    return child
            if self._bell.fileno() in ready:
                with contextlib.suppress(OSError):
                    while self._bell.recv(4096):
                        pass
            self._reap()

    def _do(self, request, fds):
        """One request.  Returns something only in a process that is forked for it."""
        what, number, *about = request
        if what == "signal":
            for pid in [pid for pid, n in self._pids.items() if n == number]:
                send_signal(pid, *about)
            return None
        if what == "end":
            self._is_dismissed = True
            return None
        try:
            child = self._start(number, fds, *about)
        except Exception as exc:
            if self._requests.fileno() < 0:     # in a forked process: that ends
                raise
            self._report("unborn", number, str(exc) or type(exc).__name__, is_lack(exc))
            child = None
        if child is None:
            for fd in fds:
                close_fd(fd)
        return child

    def _start(self, number, fds, is_forked, fields, names):
        """Have a child; in a forked one return what that is."""
        if len(fds) <= len(names):
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        *ends, output = fds
        spec = ChildSpec(*fields)._replace(
            module=self._spec.module, path=sys.path, parent=os.getpid(),
            **dict(zip(names, ends)))
        pid = self._fork(spec) if is_forked else self._execute(spec, ends, output)
        if not pid:
            return self._born(spec, output)
        self._pids[pid] = number
        self._report("born", number, pid)
        return None

    def _execute(self, spec, ends, output):
        for fd in ends:
            os.set_inheritable(fd, True)
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            return spawn(start_argv("run_child", spec), ends, null, output)
        finally:
            close_fd(null)

    def _fork(self, spec):
        import gc

        if not self._has_forked:
            self._has_forked = True
            # The same for all of them: what is done here is shared.
            self._stage.app.override(**spec.settings)
            _ = self._stage.app.settings        # resolved when first asked for
            gc.collect()
            gc.freeze()         # else the next collection would copy all there is
        return own_fork()

    def _born(self, spec, output):
        """In a forked process: let go of what is the nursery's."""
        os.setsid()
        signal.set_wakeup_fd(self._wakeup)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            if handler is not None:         # one of C code
                set_signal(number, handler)
        for fd, before in zip((1, 2), self._outputs):
            if os.path.samestat(os.fstat(fd), before):      # the app has left it
                os.dup2(output, fd)
        close_fd(output)
        for end in (self._bell, self._ringer):
            end.close()
        close_fd(self._spec.crash)
        if "numpy.random" in sys.modules:       # random itself does so
            sys.modules["numpy.random"].seed()
        # What the import has made, such as a temporary folder, all of us use: that it
        # goes at the exit is for the nursery to see, which is the last to go.
        for finalizer in list(getattr(weakref.finalize, "_registry", ())):
            finalizer.atexit = False
        return Child(spec, self._stage)

    def _reap(self):
        """Tell of those that have died; first kill what they have left behind."""
        for pid in list(self._pids):
            found = bury(pid)
            if found:
                self._report("gone", self._pids.pop(pid), *found)

    def _end(self, status):
        """Kill all that is ours, and see that exit handlers do not last for ever."""
        self._reports.detach()                  # its end is to be that of the process
        signal.set_wakeup_fd(self._wakeup)
        # The hooks at a fork hold us to the very end, when Python 3.9 cannot warn any
        # more of a socket that is open, and crashes.
        for end in (self._requests, self._bell, self._ringer):
            end.close()
        for pid in self._pids:
            kill_group(pid)
            send_signal(pid, signal.SIGKILL)    # it may have no group yet
        grace = EXIT_GRACE / 2
        if status == 0 and not self._is_dismissed:
            # What the import has started ends too; its exit handlers get a moment.
            grace = _ORPHAN_GRACE
            own_start(self._kill_group, (2 * grace,))
            self._stage.at_last = self._kill_group
        set_signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 2 * EXIT_GRACE)
        if is_held():
            end_soon(status, grace)

    @staticmethod
    def _kill_group(seconds=0.0):
        own_sleep(seconds)
        os.killpg(0, signal.SIGKILL)


# == Births ===================================================================
# Owns what a worker asks of its nursery, and hears from it: that children be born,
# and get signals, how they have ended, and what there is to know of the app.  Asks
# without waiting.  A nursery that does not answer is killed, with all that it has.

_ANSWER_SECONDS = 5.0       # a nursery that answers no request for so long is stuck
_DEATH_SECONDS = 2.0        # … and one that cannot say that a killed child is dead
_LOOK_SECONDS = 0.1         # between two looks whether it is stopped
_REPORT_BYTES = 1 << 16


class Failure(NamedTuple):
    """Why a nursery has not got the app, or a child was not born."""

    text: str
    lacks: bool = False         # for want of what there may be later
    is_usage: bool = False      # what was asked for is wrong
    stack: str = ""             # where a crash was


class _Line:
    """A worker's end of the connection to its nursery.  Sends without waiting."""

    def __init__(self, theirs: contextlib.ExitStack, undo: contextlib.ExitStack):
        (self._requests, asked), (self._reports, said) = frame_pair(), socket_pair()
        for end in (self._requests, self._reports):
            undo.callback(end.close)
            end.setblocking(False)
        for end in (asked, said):
            theirs.callback(end.close)
        output, self.their_output = pipe_from(undo, theirs)
        self._crash, its_crash = stack_pipe(undo, theirs)
        self._output = OutputPipe(output)
        self.theirs = asked.fileno(), said.fileno(), its_crash
        self._unread = b""              # of a report that has not come whole
        self._selector: Any = None      # that listens

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Have the selector say "nursery" when there is something to hear."""
        self._selector = selector
        selector.register(self._reports, selectors.EVENT_READ, "nursery")
        self._output.mind(selector, True, "nursery")

    def send(self, request: list, fds: Sequence[int] = ()) -> None:
        """Send a request, with descriptors.  Raises OSError."""
        send_with(self._requests, json.dumps(request).encode(), fds)

    def heard(self) -> tuple[list, bool]:
        """(reports that have come, False when no more will)."""
        found: list = []
        while True:
            try:
                chunk = self._reports.recv(_REPORT_BYTES)
                *lines, self._unread = (self._unread + chunk).split(b"\n")
                found += map(json.loads, lines)
            except BlockingIOError:
                return found, True
            except (OSError, *NONSENSE):
                return found, False
            if not chunk:
                return found, False

    def text(self, at_end: bool = False) -> str:
        """What was written to its standard output: whole lines, till the end."""
        text = self._output.cut(self._output.read(), at_end)
        if self._output.is_mute and self._selector:
            self._output.mind(self._selector, False, "nursery")
        return text.rstrip("\n")

    def stack(self) -> str:
        """The Python stack that faulthandler wrote, if any."""
        return read_stacks(self._crash, TRACEBACK_CHARS)

    def wait(self, seconds: float) -> None:
        """Until there is something to hear."""
        poll = own_poll()
        for fd in (self._reports.fileno(), self._output.fd):
            if fd != self._output.fd or not self._output.is_mute:
                poll.register(fd, select.POLLIN)
        poll.poll(1000 * seconds)

    def hang_up(self) -> None:
        """Tell it to end; a worker that dies does not come to say so."""
        with contextlib.suppress(OSError):
            self.send(["end", 0])
        self._requests.close()

    def close(self) -> None:
        """It has ended."""
        if self._selector:
            self._output.mind(self._selector, False, "nursery")
            self._selector.unregister(self._reports)
        self.hang_up()
        self._reports.close()
        for fd in (self._output.fd, self._crash):
            close_fd(fd)


class ChildProcess:
    """The process of one child, as far as its nursery has told."""

    def __init__(self, nursery: Nursery, number: int):
        self._nursery, self._number = nursery, number
        self.pid = 0                        # once it is born
        self.exit: Exit | None = None       # once it is dead
        self.failure: Failure | None = None     # why it was not born
        self.is_orphan = False              # its nursery has died

    def poll(self) -> Exit | None:
        """How it ended; None while it lives, as far as is known."""
        return self.exit

    def signal(self, number: int) -> None:
        """Send it a signal, while it lives."""
        if not self.exit:
            self._nursery.signal(self._number, number)

    def end(self, seconds: float) -> bool:
        """Wait for its end; after so many seconds kill it.  With it goes its group.

        False: it had to be killed.
        """
        by_itself = self._nursery.await_end(self, seconds)
        if not by_itself:
            by_itself = has_ended(self.pid)     # a busy nursery has not come to say so
            self.signal(signal.SIGKILL)
            if not self._nursery.await_end(self, _DEATH_SECONDS):
                self._nursery.give_up()
        return by_itself


class Nursery:
    """The worker's side of a nursery; when that has died, start() makes another."""

    def __init__(self, app_spec: str, log: Callable = nobody):
        self.app_spec = app_spec
        self._log = log                 # log(event, None, **fields)
        self._wanted = "auto"           # the setting start_method
        self.spec: Any = None           # ChildSpec of all children
        self.process: Process | None = None     # while it runs
        self.registry: Registry | None = None   # once it has the app
        self.failure: Failure | None = None     # or else
        self._why_not = ""              # its children cannot be forked, in words
        self._began = 0.0               # monotonic: its start
        self._is_slow = False           # that was said
        self.has_served = False         # a child of it was ready
        self._number = 0                # of the child that was asked for last
        self._children: dict[int, ChildProcess] = {}    # that live, by number
        self._asked: dict[int, float] = {}      # since when each is to be born
        self._line: Any = None

    def start(self, at: float, selector: selectors.BaseSelector | None = None) -> None:
        """Start the process, and listen to it.  Raises OSError."""
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as undo:
            line = _Line(theirs, undo)
            null = os.open(os.devnull, os.O_RDONLY)
            theirs.callback(close_fd, null)
            spec = NurserySpec(__name__, self.app_spec, sys.path, os.getpid(),
                               *line.theirs)
            argv = start_argv("run_nursery", spec)
            process = Process(spawn(argv, line.theirs, null, line.their_output))
            undo.pop_all()
        self.process, self._line = process, line
        self.registry = self.failure = None
        self._began, self._is_slow, self.has_served = at, False, False
        if selector:
            line.watch(selector)

    def serve(self, db: str, settings: types.SimpleNamespace, has_async: bool,
              log: Callable, selector: selectors.BaseSelector) -> None:
        """Begin to serve a worker, who hears of what is said by its selector."""
        self.spec = child_spec(self.app_spec, db, settings, has_async)
        self._wanted, self._log = settings.start_method, log
        if self.process is not None:
            self._line.watch(selector)

    @property
    def can_bear(self) -> bool:
        """True when it may be asked for children."""
        return self.process is not None and self.registry is not None

    @property
    def start_method(self) -> str:
        """How children are started, fork or spawn, and why not by fork."""
        if self._wanted == "spawn":
            return "spawn, because start_method says so"
        if self._wanted == "auto" and self._why_not:
            return f"spawn, because {self._why_not}"
        return "fork"

    def bear(self, spec: ChildSpec, output: int) -> ChildProcess:
        """Ask for a child with these descriptors; `output` is to be its standard one.

        Raises OSError.
        """
        names = [name for name in CHILD_ENDS if getattr(spec, name, -1) >= 0]
        fds = [getattr(spec, name) for name in names] + [output]
        number, is_forked = self._number + 1, self.start_method == "fork"
        fields = spec._replace(path=[])
        self._line.send(["start", number, is_forked, fields, names], fds)
        child = self._children[number] = ChildProcess(self, number)
        self._number, self._asked[number] = number, time.monotonic()
        return child

    def signal(self, child: int, number: int) -> None:
        """Have a signal sent to a child, if it still lives."""
        if self.process is not None:
            with contextlib.suppress(OSError):      # it is dead, or will be given up
                self._line.send(["signal", child, number])

    def hear(self) -> None:
        """Take in what it says.  One that has died takes its children along."""
        if self.process is None:
            return
        (reports, alive), was_importing = self._line.heard(), self.is_importing
        try:
            for report in reports:
                self._understand(*report)
        except (KeyError, *NONSENSE):
            alive = False
        self._tell_output(at_end=was_importing and not self.is_importing)
        if not alive:
            self.give_up(_LOOK_SECONDS)

    def _tell_output(self, at_end=False):
        """What the import prints, and what else the app does in that process."""
        text = self._line.text(at_end)
        if text:
            self._log("output", None, text=text)

    def _understand(self, what, about, *more):
        if what == "app":
            self._why_not, = more
            self.registry = Registry.read(about)
        elif what == "failed":
            self.failure = Failure(about, *more)
        elif what == "born":
            self._asked.pop(about, None)
            self._children[about].pid, = more
        elif what == "unborn":
            self._asked.pop(about, None)
            child = self._children.pop(about)
            child.failure, child.exit = Failure(*more), Exit(None, None, 0)
        elif what == "gone":
            self._children.pop(about).exit = Exit(*more)

    @property
    def is_importing(self) -> bool:
        """True while it has not got the app yet."""
        return self.process is not None and not (self.registry or self.failure)

    def mind(self, at: float) -> None:
        """Say once that the import takes long; give up one that does not answer."""
        if self.is_importing and not self._is_slow:
            self._is_slow, stack = is_slow(self._began, at, self._line.stack)
            if self._is_slow:
                self._log("child_error", None, pid=self.process and self.process.pid,
                          stack=stack or None,
                          error=f"the app is not imported after {SLOW_SECONDS:g} s: it "
                          "is waited for")
        if self._asked and at - min(self._asked.values()) > _ANSWER_SECONDS:
            self.give_up()
        elif self.process and self.process.poll():  # somebody else may have its end
            self.hear()
            self.give_up()

    def await_app(self, each_time: Callable) -> Registry:
        """Wait until the app is imported.  Raises Problem, or UsageError.

        When something is heard, and once a second, `each_time` is called.
        """
        while self.is_importing:
            self._line.wait(1.0)
            self.hear()
            self.mind(time.monotonic())
            each_time()
        if self.registry is None:
            failure = self.failure or Failure("")
            self.stop(EXIT_GRACE)
            raise (UsageError if failure.is_usage else Problem)(
                "\n".join(filter(None, (failure.text, failure.stack))))
        return self.registry

    def await_end(self, child: ChildProcess, seconds: float) -> bool:
        """Wait so long for the end of a child; True when it has come."""
        began = time.monotonic()
        while not child.exit:
            self.hear()
            waited = time.monotonic() - began
            if child.exit or self.process is None or waited >= seconds \
                    or waited >= _LOOK_SECONDS and is_stopped(self.process.pid):
                break
            self._line.wait(min(seconds - waited, _LOOK_SECONDS))
        return child.exit is not None

    def give_up(self, seconds: float = 0.0) -> None:
        """It is dead, or shall be; its children end with it, and their groups.

        One that closed its connection gets so long to end by itself.
        """
        process, line = self.process, self._line
        if process is None:
            return
        died = process.end(_LOOK_SECONDS if self.failure else seconds)
        how = process.exit and (process.exit.signal or f"exit code {process.exit.code}")
        stack = line.stack()
        self._tell_output(at_end=True)
        self.process = None
        line.close()
        if died:
            why = f"ended with {how}"
        elif seconds:
            why = "closed its connection to the worker, and was killed: does the " \
                "app close descriptors that are not its own?"
        else:
            why = "did not answer, and was killed"
        if self.registry and self.has_served:
            self._log("child_error", None, pid=process.pid, stack=stack or None,
                     error=f"the nursery {why}: its children end with it, and another "
                     "is started")
        elif not self.failure:
            who = "the nursery, before a child of it was ready," if self.registry else \
                f"cannot import --app {self.app_spec}: the process that imports it"
            self.failure = Failure(f"{who} {why}", died and how == "SIGKILL", False,
                                   stack)
        # By their numbers, though somebody else may have waited for them by now: one
        # that has members stays theirs, and a free one comes back after all others.
        for child in self._children.values():
            if child.pid:
                kill_group(child.pid)
            child.exit, child.is_orphan = Exit("SIGKILL", None, 0), True
        self._children.clear()
        self._asked.clear()

    def kill(self) -> None:
        """Kill it with its group, at once; for a signal handler."""
        if self.process is not None:
            kill_group(self.process.pid)

    def stop(self, seconds: float) -> None:
        """End it; it kills what it still has, and runs exit handlers for so long."""
        if self.process is None:
            return
        self._line.hang_up()
        self.process.end(max(0.0, seconds))
        self._tell_output(at_end=True)
        self._line.close()
        self.process = None


# == Load =====================================================================
# Owns the runs that a child has, as the worker sees them: which it was sent, since
# when each is in flight, what it printed.  Decides nothing.
#
# A child has places of three kinds.  Its main thread runs one task at a time, and
# others wait behind that one in a pipe: `waiting`.  What it has `beside` runs in its
# threads or on its event loop; nothing is sent there that has no place, so nothing
# waits, and what is sent has begun.
#
# `at`, from here to the Worker, is monotonic seconds: every span is measured by a
# clock that nobody can set.

STALL_SECONDS = 0.02        # a run this long has what waits behind it recalled,
                            # and the worker reads what it writes
UNTAKEN_SECONDS = 0.5       # … and for so long an event loop may leave a frame alone


class Verdict(enum.Enum):
    """Why a child is to be killed."""

    TIMEOUT = "its run has reached the time limit"
    CANCELLED = "its run is cancelled"
    STUCK = "the same run has not ended within the grace: it dumps its stack"
    MEMORY = "it takes more than max_memory"
    MAD = "it sent what is no message"
    TOO_MUCH = "we have not the memory for what it sent"
    CUT_OFF = "it has closed its connection to us"


OF_A_RUN = (Verdict.TIMEOUT, Verdict.CANCELLED)     # void once that has ended


class Slot:
    """A place for one run in a child: since when, what it printed, its verdict."""

    run: Run | None             # that has it; None: it has ended, or was recalled
    began: float                # monotonic
    verdict: Verdict | None     # on this run
    kill_due: float             # monotonic; 0: not to be killed
    kept: Kept | None           # of what it printed; None: nothing
    _strange_chars: int         # that others printed meanwhile

    def __init__(self, log: Callable, at: float, is_coroutine: bool = False):
        self._log = log             # log(event, run, **fields)
        self.is_coroutine = is_coroutine        # its runs are on the event loop
        self.announced: Run | None = None       # the last whose start was said
        self.begin(None, at)

    def begin(self, run: Run | None, at: float) -> None:
        """From now on this run has it; None: nobody."""
        self.run, self.began = run, at
        self.verdict, self.kill_due = None, 0.0
        self.kept = None
        self._strange_chars = 0

    def announce(self) -> None:
        """Say that its run has started, once."""
        run = self.run
        if run is not None and run is not self.announced:
            self.announced = run
            self._log("task_start", run)

    def printed(self, text: str, is_own: bool = True) -> None:
        """Log a text, up to a limit for each run; keep it if it is the run's own."""
        before = self._strange_chars
        if is_own:
            kept = self._keep()
            before = kept.size
            kept.add(text)
            self.announce()
        else:
            self._strange_chars += len(text)
        text = cut_output(text, before)
        if text:
            self._log("output", self.run if is_own else None, text=text.rstrip("\n"))

    def skipped(self, size: int) -> None:
        """It has printed so much that its child has not sent."""
        self._keep().skip(size)

    def _keep(self):
        if self.kept is None:
            self.kept = Kept()
        return self.kept

    def text(self) -> str:
        """All that is kept."""
        return self.kept.text() if self.kept else ""


class Beside(dict):
    """The runs that a child has beside its main thread: id and attempt, and a Slot.

    It knows when something is due in one of them without a look at the others.
    """

    def __init__(self, log: Callable):
        super().__init__()
        self._log = log
        self.coroutines = 0                 # how many of them are on the event loop
        self.kill_due = 0.0                 # of the first that is to be killed
        self.blocker: Slot | None = None    # it keeps the event loop from going on
        self._blocked_at = 0.0              # when we heard of that
        self._blocked_since = 0.0           # when it began
        self.shut_until = 0.0               # nobody takes frames for that, it seems
        # (when, number, slot): each slot has one entry, those that ended may.
        self._agenda: list[tuple[float, int, Slot]] = []
        self._numbers = itertools.count()

    def begin(self, run: Run, is_coroutine: bool, at: float) -> None:
        """A run was sent, and has begun."""
        slot = self[run.id, run.attempt] = Slot(self._log, at, is_coroutine)
        slot.begin(run, at)
        self.coroutines += is_coroutine
        self.note(at + STALL_SECONDS, slot)

    def end(self, slot: Slot) -> None:
        """The run of this slot is over, or was recalled."""
        run = slot.run
        assert run is not None
        del self[run.id, run.attempt]
        self.coroutines -= slot.is_coroutine
        slot.run = None
        if self.blocker is slot:
            self.blocker = None
        if slot.kill_due:
            due = [other.kill_due for other in self.values() if other.kill_due]
            self.kill_due = min(due, default=0.0)

    def recall(self, ids: set[int]) -> list[Run]:
        """Runs that were read back; they had not begun."""
        slots = [slot for of, slot in self.items() if of[0] in ids] if ids else []
        back = [slot.run for slot in slots if slot.run]
        for slot in slots:
            self.end(slot)
        return back

    def condemn(self, slot: Slot, verdict: Verdict, kill_due: float) -> None:
        """Have the child killed then, unless the run ends before."""
        slot.verdict, slot.kill_due = verdict, kill_due
        self.kill_due = min(kill_due, self.kill_due or kill_due)

    def goes_on(self, slot: Slot) -> None:
        """This run was heard of: if another blocked its event loop, it does no more."""
        if slot.is_coroutine:
            self.shut_until = 0.0
            if slot is not self.blocker:
                self.blocker = None

    def was_taken(self, slot: Slot) -> None:
        """Its frame is not there any more, so its event loop went on since it was."""
        if self.blocker and slot.run and slot.began > self._blocked_at:
            self.blocker = None

    def block(self, slot: Slot, seconds: float, at: float) -> None:
        """This run keeps the event loop from going on: nothing more is for that."""
        self.blocker, self._blocked_at, self._blocked_since = slot, at, at - seconds
        self.shut_until = at + UNTAKEN_SECONDS

    def is_held_up(self, slot: Slot) -> bool:
        """True when another kept this run from its end before its limit came."""
        return self.blocker is not None and slot is not self.blocker \
            and slot.is_coroutine and slot.verdict is Verdict.TIMEOUT \
            and slot.run is not None \
            and slot.began + (slot.run.timeout or 0.0) > self._blocked_since

    def note(self, when: float, slot: Slot) -> None:
        """Have due() name this slot then."""
        heapq.heappush(self._agenda, (when, next(self._numbers), slot))
        if len(self._agenda) > 2 * len(self) + 64:
            self._agenda = [entry for entry in self._agenda if entry[2].run]
            heapq.heapify(self._agenda)

    def next_due(self) -> float:
        """When something is due in one of them; infinite: in none."""
        agenda = self._agenda
        while agenda and not agenda[0][2].run:
            heapq.heappop(agenda)
        return agenda[0][0] if agenda else math.inf

    def due(self, at: float) -> list[Slot]:
        """Those in which something is due: each is named once."""
        found = []
        while self.next_due() <= at:
            found.append(heapq.heappop(self._agenda)[2])
        return found


class Load:
    """What a child has to do."""

    def __init__(self, wire: WorkerEnd, pipe: OutputPipe, log: Callable, at: float):
        self.wire, self.pipe = wire, pipe
        self.slot = Slot(log, at)       # of the main thread: waiting[0] has it
        self.waiting: collections.deque = collections.deque()   # sent; [0] runs
        self.behind = 0.0               # seconds that all but [0] usually take
        self.beside = Beside(log)
        self.done = 0                   # runs answered

    @property
    def is_idle(self) -> bool:
        """True when no run is in it."""
        return not (self.waiting or self.beside)

    @property
    def is_taken(self) -> bool:
        """True when it is for one run alone, which must have no neighbours."""
        slot = self.sole()
        return slot is not None and slot.run is not None and slot.run.alone

    def sole(self) -> Slot | None:
        """The slot of the only run in flight; None: there are more, or none."""
        if not self.beside:
            return self.slot if self.waiting else None
        if self.waiting or len(self.beside) > 1:
            return None
        return next(iter(self.beside.values()))

    def slots(self) -> list[Slot]:
        """Those of the runs in flight, the main thread's first."""
        return [self.slot, *self.beside.values()] if self.waiting \
            else list(self.beside.values())

    def slot_of(self, run_id: int) -> Slot | None:
        """That of a run in flight."""
        return next((s for s in self.slots() if s.run and s.run.id == run_id), None)

    def runs(self) -> list[Run]:
        """All runs that it was sent and has not answered."""
        return [*self.waiting, *[slot.run for slot in self.beside.values()]]

    def send(self, run: Run, at: float, cell: int = NO_CELL) -> bool:
        """Send a frame.  False when its socket is full, or it just died."""
        if not self.wire.send(run, cell):
            return False
        self.waiting.append(run)
        if len(self.waiting) == 1:
            self._begin_head(at)
        else:
            self.behind += run.usual
        return True

    def send_beside(self, run: Run, is_coroutine: bool, at: float,
                    cell: int = NO_CELL) -> bool:
        """Send a frame to the event loop, or to the threads.  False: as above."""
        send = self.wire.send_beside if is_coroutine else self.wire.send
        if not send(run, cell):
            return False
        self.beside.begin(run, is_coroutine, at)
        self.pipe.begin()
        if not self.waiting:        # what is nobody's may be said again
            self.slot.begin(None, at)
        return True

    def end(self, slot: Slot, at: float) -> None:
        """The run of this slot has ended."""
        if slot is self.slot:
            self.begin_next(at)
        else:
            self.beside.end(slot)

    def begin_next(self, at: float) -> None:
        """The first of `waiting` has ended."""
        self.waiting.popleft()
        if self.waiting:
            self.behind = max(0.0, self.behind - self.waiting[0].usual)
        self._begin_head(at)

    def _begin_head(self, at):
        if len(self.waiting) < 2:       # else floats leave a trace
            self.behind = 0.0
        self.slot.begin(self.waiting[0] if self.waiting else None, at)
        self.pipe.begin()

    def recall(self) -> list:
        """Read back the frames that the child has not taken; return their runs."""
        ids = self.wire.recall()
        back = [run for run in self.waiting if run.id in ids]
        self.waiting = collections.deque(r for r in self.waiting if r.id not in ids)
        head = self.waiting[0] if self.waiting else None
        if head is not self.slot.run:       # the child may have taken just the second
            self.slot.begin(head, self.slot.began)
        self.behind = sum(run.usual for run in itertools.islice(self.waiting, 1, None))
        return back + self.beside.recall(ids)

    def recall_untaken(self, at: float) -> list[Run]:
        """Read back what is there for an event loop that takes nothing.

        Nothing is sent there for a while, or until it is heard of.
        """
        back = self.beside.recall(self.wire.recall_beside())
        if back:
            self.beside.shut_until = at + UNTAKEN_SECONDS
        return back

    @property
    def settles_at(self) -> float:
        """From when on the pipe surely holds what was written by whom it is booked on.

        One that began just now may be over, and the next at work: then the child
        empties the pipe itself, before it answers.  Guarded by
        test_what_c_code_writes_is_booked_on_the_run_that_wrote_it.
        """
        slot = self.sole() if self.beside else self.slot
        return slot.began + STALL_SECONDS if slot else 0.0      # of many, nobody's

    def is_settled(self, at: float) -> bool:
        """True when that time has come."""
        return self.is_idle or at >= self.settles_at

    def mind_output(self, selector: selectors.BaseSelector, at: float) -> None:
        """Have the selector tell of the pipe while its text can be booked."""
        self.pipe.mind(selector, self.is_settled(at), self)

    def read_output(self) -> None:
        """Take in what C code, or a subprocess, has written to stdout and stderr."""
        self.written(self.pipe.read())

    def written(self, data: bytes) -> None:
        """Book what came by the pipe on the run, if it surely is of that."""
        self._book(self.pipe.cut(data, at_end=self.is_idle))

    def _book(self, text):
        """Of many runs in flight, it is nobody's."""
        slot = self.sole()
        if slot:
            slot.printed(text, not self.pipe.strays)
        else:
            self.slot.printed(text, self.is_idle)

    def finish(self, slot: Slot) -> str:
        """The run of this slot has ended: return all that is kept of its output."""
        slot.announce()
        if not self.beside or slot is self.sole():
            rest = self.pipe.cut(b"", at_end=True)
            if rest:
                self._book(rest)
        return slot.text()


# == Member ===================================================================
# Owns one child as the worker sees it: its process, its sockets and pipes, how far
# its life has come, and why it is to end.  Decides nothing.


class Phase(enum.Enum):
    """How far the life of a child has come."""

    STARTING = "it imports the app"
    READY = "it may be given work"
    RETIRING = "it takes nothing more, and is replaced"
    LEAVING = "it was told to exit"


_READY_PHASE = Phase.READY      # looked up once: `able` is asked in each turn


class Member(Load):
    """One child of the pool."""

    scarcity: Scarcity | None = None    # of memory, when somebody has killed it

    def __init__(self, nursery: Nursery, spec: ChildSpec, log: Callable, at: float):
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as undo:
            wire = WorkerEnd(undo, spec.coroutines > 0)
            output, child_output = pipe_from(undo, theirs)
            self.crash, child_crash = stack_pipe(undo, theirs)
            frames, messages, beside = wire.theirs()
            spec = spec._replace(frames=frames, messages=messages, beside=beside,
                                 crash=child_crash, output=output)
            self.process = nursery.bear(spec, child_output)
            undo.pop_all()
        wire.given()
        super().__init__(wire, OutputPipe(output), log, at)
        self.began = at                 # monotonic
        self.phase = Phase.STARTING
        self.verdict: Verdict | None = None     # on the child, not on its run
        self._kill_due = 0.0            # when that is carried out
        self._reason = ""               # why it could not start
        self._lacks = False             # … for want of what there may be later

    @property
    def able(self) -> bool:
        """True when it may be given work."""
        return self.phase is _READY_PHASE and not (
            self._kill_due or self.slot.kill_due or self.verdict
            or self.beside.kill_due)

    @property
    def ready(self) -> bool:
        """True when it has imported the app."""
        return self.phase is not Phase.STARTING

    @property
    def is_retiring(self) -> bool:
        """True when it is to be replaced anyway."""
        return self.phase in (Phase.RETIRING, Phase.LEAVING)

    @property
    def kill_due(self) -> float:
        """When it is to be killed; 0: not at all."""
        if self._kill_due:
            return self._kill_due
        own, of_others = self.slot.kill_due, self.beside.kill_due
        return min(own, of_others) if own and of_others else own or of_others

    @property
    def why(self) -> Verdict | None:
        """Why it is to be killed, or was."""
        found = self.verdict or self.slot.verdict
        if found is None and self.beside.kill_due:
            found = next(filter(None, [s.verdict for s in self.beside.values()]), None)
        return found

    def condemn(self, verdict: Verdict, kill_due: float,
                slot: Slot | None = None) -> None:
        """Have it killed then, unless that is about a run, and it ends before.

        About that of the main thread, if no slot is given.
        """
        slot = slot or self.slot
        if verdict not in OF_A_RUN:
            self.verdict, self._kill_due = verdict, kill_due
        elif slot.run is None:      # it had not begun, and was recalled
            pass
        elif slot is self.slot:
            slot.verdict, slot.kill_due = verdict, kill_due
        else:
            self.beside.condemn(slot, verdict, kill_due)

    def cannot_start(self, reason: str, lacks: bool) -> None:
        """What it says of the import of the app."""
        self._reason, self._lacks = reason, lacks

    def has_lacked(self) -> bool:
        """True when it could not start for want of memory, or something like that.

        Whoever is killed before it is ready is so by the kernel, out of memory.
        """
        failure = self.process.failure
        if failure:
            return failure.lacks
        return self._lacks or not self.why and self.phase is not Phase.LEAVING \
            and self.process.exit is not None \
            and self.process.exit.signal == "SIGKILL"

    def outgrows(self, limit: int | None) -> bool:
        """True when it takes more than `limit` bytes before its first run."""
        taken = memory_bytes(self.process.pid) if limit else 0
        if limit and taken > limit:
            self._reason = (
                f"max_memory is {limit >> 20} MiB, and to import the app alone takes "
                f"{taken >> 20} MiB"
            )
        return bool(limit and taken > limit)

    def last_words(self) -> str:
        """Why it could not start."""
        said = self._reason or self.slot.text()
        end, failure = self.process.exit, self.process.failure
        if failure:
            return failure.text
        how = end and (end.signal or f"exit code {end.code}")
        return said or f"it died at once: {how}"

    def read_stack(self) -> str:
        """The Python stack that faulthandler wrote, if any."""
        return read_stacks(self.crash, TRACEBACK_CHARS)

    def interrupt(self, run_id: int) -> None:
        """Have TaskCancelled raised in this run, if it still runs."""
        self.wire.cancel(run_id)
        self.process.signal(signal.SIGUSR1)

    def wait(self, seconds: float, verdict: Verdict | None = None) -> None:
        """Wait for its end; after so many seconds kill it, for this reason."""
        if not self.process.end(seconds):
            self.verdict = self.why or verdict

    def leave(self, kill_due: float) -> None:
        """Tell it to exit: it has nothing to do."""
        self.wire.hang_up()
        self.phase, self._kill_due = Phase.LEAVING, kill_due

    def watch(self, selector: selectors.BaseSelector) -> None:
        """Have the selector name us when there is something to read.

        Raises OSError, and kills the child, when it cannot.
        """
        try:
            selector.register(self.wire.messages, selectors.EVENT_READ, self)
            self.mind_output(selector, 0.0)
        except OSError:
            self.wait(0)
            self.close(selector)
            raise

    def close(self, selector: selectors.BaseSelector) -> None:
        """Close our ends.  The child must be dead."""
        for channel in (self.wire.messages, self.pipe.fd):
            with contextlib.suppress(KeyError):
                selector.unregister(channel)
        self.wire.close()
        for fd in (self.pipe.fd, self.crash):
            close_fd(fd)


# == Hearing ==================================================================
# Owns what the messages of a child mean: for its run, its output and its life.  What
# the pool has to know of them is added to a Said.

_KINDS_OF_ERRORS = ("exception", "timeout", "abort", "cancelled")    # by a child


class Ended(NamedTuple):
    """How a run ended, as far as the pool knows."""

    run: Run
    kind: str   # success, exception, timeout, crash, abort, cancelled; unknown: not run
    result: str | None = None
    error: dict | None = None       # also retryable, countdown; crash: exit data
    output: str = ""
    started_at: int | None = None
    duration: float | None = None


class Said(NamedTuple):
    """What children said of their runs, and of themselves."""

    ended: list[Ended]
    progress: dict[int, tuple[Run, str]]    # by id of the run: the latest
    tasks: list[set]                        # that a child, now ready, knows
    lags: list[tuple[Run, float, str]]      # that block a loop; seconds, stack
    spent: list[tuple[Run, str]]            # that have left something; what


def hear(member: Member, said: Said, max_payload: int, at: float) -> tuple:
    """Take in what this child sent, and add to `said`.  Never raises.

    Returns (False when the socket is at its end, what was wrong).
    """
    alive, wrong = True, None
    try:
        alive = member.wire.read()
        for message in member.wire.heard(max_payload):
            _understand(member, said, message, at)
    except NONSENSE:
        wrong = Verdict.MAD
    except MemoryError:             # costs this run, not the worker
        wrong = Verdict.TOO_MUCH
        member.wire.go_deaf()
    return alive, wrong


def _understand(member, said, message, at):
    """Raises ValueError for what a child in its right mind does not say."""
    kind, of, value, started_at, duration = message
    slot = member.slot
    run = slot.run
    if run is None or (run.id, run.attempt) != of:
        slot = member.beside.get(of)
        if slot is not None:
            run = slot.run
            member.beside.goes_on(slot)
    if slot is not None and kind is SUCCEEDED:              # most are
        said.ended.append(
            _answered(member, slot, None, value, started_at, duration, at))
    elif kind in _OF_NO_RUN:
        _understand_child(member, said, kind, value)
    elif kind is PRINTED:
        (slot or member.slot).printed(value, bool(slot) or member.is_idle)
    elif kind is WRITTEN and (slot or of == (0, 0)):
        member.written(value)
    elif kind in (PROGRESSED, LAGGED, SKIPPED) and slot is None:
        pass                        # of a thread, as the run was ending
    elif slot is None:
        raise ValueError("an answer that nobody asked for")
    elif kind is SPENT:
        said.spent.append((run, value))
    elif kind is SKIPPED:
        slot.skipped(_checked_size(value))
    elif kind is LAGGED:
        said.lags.append((run, *_checked_lag(member, slot, value, at)))
    elif kind is PROGRESSED:
        percent, text = value
        said.progress[run.id] = run, to_json([percent, text])
    elif kind is UNKNOWN:
        member.end(slot, at)
        said.ended.append(Ended(run, "unknown"))
    else:
        error = _checked_error(value)
        said.ended.append(
            _answered(member, slot, error, None, started_at, duration, at))


_OF_NO_RUN = (READY, BROKEN, LACKING, STRAYS)


def _understand_child(member, said, kind, value):
    if kind is READY:
        said.tasks.append(set(value))
    elif kind is STRAYS:
        member.pipe.set_strays(value)
    else:
        member.cannot_start(value, kind is LACKING)


def _answered(member, slot, error, result, started_at, duration, at):
    """The run of this slot has ended like this."""
    run, kind = slot.run, error["kind"] if error else "success"
    if error and slot.verdict is Verdict.CANCELLED:      # whatever it says
        kind = "cancelled"
    text = member.finish(slot)
    member.end(slot, at)            # with it goes a verdict on the run
    member.done += 1
    return Ended(run, kind, result, error, text, started_at, duration)


def _checked_lag(member, slot, value, at):
    """(seconds, stack) of a run that blocks the event loop of this child."""
    seconds, stack = value
    if not slot.is_coroutine or not isinstance(stack, str) \
            or not 0 <= seconds < LATEST_MS:
        raise ValueError("a lag that cannot be")
    member.beside.block(slot, seconds, at)
    return seconds, stack


def _checked_size(value):
    """A number of characters.  Raises ValueError for what cannot be one."""
    if type(value) is not int or not 0 <= value <= LATEST_MS:
        raise ValueError("a size that cannot be")
    return value


def _checked_error(error):
    """The error that a child describes.  Raises ValueError when it is none."""
    if not isinstance(error, dict) or error.get("kind") not in _KINDS_OF_ERRORS:
        raise ValueError("an error without a kind")
    countdown = error.get("countdown")
    if countdown is not None and not -LARGEST <= countdown <= LARGEST:
        raise ValueError("a countdown that cannot be")
    return error


# == Placement ================================================================
# Owns the choice of the child that a run goes to: where there is room, what may
# wait in a pipe, and what is taken back from one.  What waits in a pipe saves its
# child the time of a commit; it waits for _AHEAD_SECONDS at most, by what runs of
# these tasks have taken so far.  Looks at the children and changes nothing.
#
# Places are counted by kind: of main threads, or of threads if a child has several,
# and of event loops.  A run that is to be alone goes to a child in which nothing
# is in flight; the spare child is there for that, too.

_AHEAD_FRAMES = 128         # waiting in one child's socket at most
_AHEAD_SECONDS = 0.05       # … and behind no more work than this
_SHORT_SECONDS = 1.0        # what takes longer does not wait, nor is it waited for
_SPARE_SECONDS = 0.005      # what waits longer goes to a child that is idle
_MOST_AT_ONCE = 128         # frames to one child's threads, or loop, in one turn
_MOST_CELLS = 1 << 20       # of Begun, in 8 MB: what has none waits for one


class Durations:
    """How long runs usually take, by name of the task."""

    def __init__(self):
        self._usual: dict[str, float] = {}      # seconds
        self.short_names: set[str] = set()      # whose runs may wait in a pipe
        self.typical = 0.0                      # of all, whatever their name

    def usual(self, name: str) -> float:
        """Seconds that a run of this task usually takes; 0 for the unknown."""
        return self._usual.get(name, 0.0)

    def learn(self, name: str, seconds: float) -> None:
        """Take a run into account; a long one counts at once."""
        self.typical += (seconds - self.typical) * 0.05
        usual = self._usual.get(name, seconds) * 0.9 + seconds * 0.1
        if seconds > _SPARE_SECONDS:
            usual = max(usual, seconds)
        self._usual[name] = usual
        if usual < _SHORT_SECONDS:
            self.short_names.add(name)
        else:
            self.short_names.discard(name)


def most_in_flight(settings: types.SimpleNamespace) -> int:
    """How many runs a worker has at most that are claimed, their end not committed.

    A child that is replaced may still have one, and a turn may claim as many as
    there are places for while it writes what has ended in them.
    """
    ordinary = max(_AHEAD_FRAMES + 2, 2 * settings.threads)
    each = ordinary + settings.coroutines
    return min((settings.concurrency + 1) * each, _MOST_CELLS)


class Room(NamedTuple):
    """How many runs could go to children."""

    free: int = 0               # main threads with nothing to do, or free threads
    ahead: int = 0              # further places in pipes
    beside: int = 0             # places on event loops
    alone: int = 0              # children with nothing in flight

    def less(self, runs: int, coroutines: int = 0) -> Room:
        """What is left when so many have been taken, and so many for event loops."""
        more = max(0, runs - self.free)
        return Room(max(0, self.free - runs), max(0, self.ahead - more),
                    max(0, self.beside - coroutines),
                    max(0, self.alone - runs - coroutines))


class Kinds(NamedTuple):
    """Where the runs of which tasks are to be."""

    threads: int = 1            # of a child: of many each runs an ordinary task
    coroutines: int = 0         # at a time on the event loop of a child
    is_async: Any = frozenset()     # container of the names whose runs go there

    @property
    def is_plain(self) -> bool:
        """True when all run in main threads."""
        return self.threads == 1 and not self.is_async


def kinds_of(settings: types.SimpleNamespace, tasks: dict[str, Entry]) -> Kinds:
    """Where a worker with these settings runs the tasks of an app."""
    is_async = frozenset(name for name, task in tasks.items() if task.is_async)
    return Kinds(settings.threads, settings.coroutines, is_async)


class Places(NamedTuple):
    """What can be done with the children of a pool at one moment."""

    takers: list[tuple]     # (delay, runs it has, number, child), a heap: the soonest
    room: Room
    slack: float            # seconds for which none will have nothing to do
    late: list[Member]      # in their pipes something waits behind a slow run
    # Heaps of [runs it has, number, places, child], by kind: the emptiest first.
    threads: list[list] = []
    loops: list[list] = []
    empty: list[Member] = []    # able ones in which nothing is in flight

    def overloaded(self, is_spare: bool) -> list[Member]:
        """Those in whose pipe something waits behind a slow run.

        And, if there is nothing else for an idle one to do (`is_spare`), the one
        in which it waits longest.
        """
        if self.late or not (is_spare and self.room.free):
            return self.late
        full = [taker for taker in self.takers if taker[1] > 1]
        delay, has, _, longest = max(full, default=(0.0, 0, 0, None))
        return [longest] if longest and (has > 2 or delay > _SPARE_SECONDS) else []


class Placement:
    """Where runs go, by what the children of a pool have now.

    `size` of them work at a time.  None is ever sent more runs than `most`.
    """

    def __init__(self, size: int, most: int | None, durations: Durations,
                 kinds: Kinds = Kinds()):
        self._size, self._most, self._durations = size, most or sys.maxsize, durations
        self._kinds, self._is_plain = kinds, kinds.is_plain

    def survey(self, members: Sequence[Member], at: float) -> Places:
        """One look at each child.  Every turn makes it: so it has to be cheap."""
        if self._is_plain:
            return self._survey_main(members, at)
        return self._survey_kinds(members, at)

    def _survey_main(self, members, at):
        """The places of main threads; who comes first among idle ones, is taken."""
        idle, takers, late = [], [], []
        free, slack = self._size, math.inf
        typical, short_names = self._durations.typical, self._durations.short_names
        for number, member in enumerate(members):
            has = len(member.waiting)
            if has:
                free -= 1               # whoever has some stays in; others come after
            if not member.able:
                continue
            if not has:
                idle.append((0.0, 0, number, member))
                continue
            head = member.waiting[0]
            left = member.slot.began + head.usual - at
            delay = (left if left > 0 else 0.0) + member.behind
            if has == 1 or delay < slack:
                slack = delay if has > 1 else 0.0
            is_few = has * typical < 2 * _AHEAD_SECONDS
            if left > -STALL_SECONDS and head.name in short_names \
                    and (is_few or at < self.late_from(member)) and not head.alone:
                takers.append((delay, has, number, member))
            elif has > 1:
                late.append(member)
        del idle[max(0, free):]
        ahead = self._places_in(takers, typical) + self._places_in(idle, typical)
        takers += idle
        heapq.heapify(takers)
        slack = 0.0 if idle or slack == math.inf else slack
        room = Room(len(idle), max(0, ahead - len(idle)), 0, len(idle))
        return Places(takers, room, slack, late)

    def _survey_kinds(self, members, at):
        """The places of each kind, in no more children than are to work at a time."""
        kinds, size = self._kinds, self._size
        usable, empty = [], []      # with runs in flight, and without
        working = on_loops = in_threads = taken = 0
        for member in members:
            coroutines = member.beside.coroutines
            on_loops += coroutines
            in_threads += len(member.beside) - coroutines
            is_idle = member.is_idle
            # A long one in a child that retires keeps its place, not its child's.
            working += not (is_idle or member.is_retiring)
            if not member.able or self.left(member) <= 0:
                continue
            if is_idle:
                empty.append(member)
            elif not member.is_taken:
                usable.append(member)
            else:
                taken += 1
        # One child stays with those that need none for themselves, if there is one.
        alone = max(len(usable) + len(empty) - 1, int(not taken))
        usable += empty[:max(0, size + (taken > 0) - working)]
        loops, beside = self._heap_of(
            (m.beside.coroutines, kinds.coroutines, m) for m in usable
            if at >= m.beside.shut_until)
        beside = min(beside, max(0, size * kinds.coroutines - on_loops))
        if kinds.threads > 1:
            threads, free = self._heap_of(
                (len(m.beside) - m.beside.coroutines, kinds.threads, m) for m in usable)
            free = min(free, max(0, size * kinds.threads - in_threads))
            found = Places([], Room(free), 0.0, [], threads)
        else:
            usable = [m for m in usable if not m.waiting]
            usable.sort(key=lambda m: m.beside.coroutines)
            busy = [m for m in members if m.waiting]
            found = self._survey_main(busy + usable, at)
        free, ahead, *_ = found.room
        empty = empty[max(0, len(empty) - alone):] if free or beside else []
        room = Room(free, ahead, beside, len(empty))
        return found._replace(room=room, loops=loops, empty=empty)

    def _heap_of(self, places):
        """(a heap for Places, how many runs it has room for)."""
        heap, count = [], 0
        for number, (has, most, member) in enumerate(places):
            room = min(most - has, self.left(member), _MOST_AT_ONCE)
            if room > 0:
                heap.append([has, number, room, member])
                count += room
        heapq.heapify(heap)
        return heap, count

    def left(self, member: Member) -> int:
        """How many runs it may be sent until it is replaced."""
        return self._most - member.done - len(member.waiting) - len(member.beside)

    def _places_in(self, takers, typical):
        """How many more runs these can take, if they are like those before."""
        places, per_second = 0, 1 / max(typical, 1e-6)
        for delay, has, _, member in takers:
            fit = int((_AHEAD_SECONDS - delay) * per_second + 0.999999)
            most = self._most - member.done - has - len(member.beside)
            if fit > _AHEAD_FRAMES - has:
                fit = _AHEAD_FRAMES - has
            if fit > 0 and most > 0:
                places += fit if fit < most else most
        return places

    def late_from(self, member: Member) -> float:
        """When what waits in this pipe has waited too long.

        For the one run that takes longer than usual; or for many, each a little.
        """
        late = member.slot.began + member.waiting[0].usual + STALL_SECONDS
        behind = len(member.waiting) - 1
        # Else it is us who are late.  By what is typical: one long run is no change.
        if behind * self._durations.typical >= 2 * _AHEAD_SECONDS:
            late = min(late, member.waiting[1].due + _AHEAD_SECONDS)
        return late

    def next_due(self, member: Member) -> float:
        """When something has to be done about this child; 0: now."""
        due = member.kill_due or math.inf
        if member.beside:
            due = min(due, member.beside.next_due())
        elif due < math.inf:
            return due
        head = member.waiting[0] if member.waiting else None
        if member.phase is Phase.RETIRING and member.is_idle:
            return 0.0
        if member.beside.shut_until:
            due = min(due, member.beside.shut_until)
        if member.pipe.is_unheard:
            due = min(due, member.settles_at)
        if head and member.slot.announced is not head:
            due = min(due, member.slot.began + STALL_SECONDS)
        if head and head.timeout and not member.slot.kill_due:
            due = min(due, member.slot.began + head.timeout)
        if len(member.waiting) > 1:
            due = min(due, self.late_from(member))
        return due

    def may_wait(self, run: Run, cell: int, delay: float, has: int,
                 member: Member) -> bool:
        """True when `run` may wait in the pipe of this child, which is not slow.

        Not its last one, unless it has a cell: whoever kills us would end its task.
        """
        return not (run.is_last and cell == NO_CELL) \
            and run.name in self._durations.short_names \
            and delay < _AHEAD_SECONDS and has < _AHEAD_FRAMES \
            and has + member.done + len(member.beside) < self._most

    def less_urgent(self, members: Sequence[Member], priority: int) -> list[Member]:
        """Those in whose pipe something less urgent waits; its end is the least."""
        return [m for m in members
                if len(m.waiting) > 1 and m.waiting[-1].priority > priority]


# == Crashes ==================================================================
# Owns the words for the end of a child, one sentence for people: by whom, or by what,
# with the evidence in brackets.  What is not known is not said.

# What a signal means, of those that end a process.
SIGNAL_WORDS = {
    "SIGSEGV": "segmentation fault", "SIGBUS": "bus error", "SIGABRT": "abort()",
    "SIGFPE": "arithmetic error, as a division by zero in C code",
    "SIGILL": "illegal instruction", "SIGTRAP": "trap",
    "SIGSYS": "forbidden system call",
    "SIGXCPU": "its CPU time is used up (RLIMIT_CPU)",
    "SIGXFSZ": "it wrote a larger file than it may (RLIMIT_FSIZE)",
    "SIGTERM": "asked to end from outside, as by kill",
    "SIGINT": "interrupted from outside, as by Ctrl-C",
    "SIGQUIT": "asked to end from outside, as by Ctrl-\\",
    "SIGHUP": "its terminal has gone, or kill -HUP from outside",
    "SIGALRM": "an alarm that it had set, and did not handle",
    "SIGVTALRM": "a timer that it had set, and did not handle",
    "SIGPROF": "a profiling timer that it had set, and did not handle",
}
_FROM_OUTSIDE = "killed from outside, as by kill -9"

# The last words of a C library, or of a runtime, that aborts.
_ABORT_LINES = re.compile(
    r"double free|corrupt|invalid (pointer|size|next size)|(malloc|realloc|free)\(\)|"
    r"munmap_chunk|stack smashing|overflow detected|terminate called|^ *what\(\):|"
    r"[Aa]ssert|Fatal Python error|panicked|fatal error")
_ABORT_CHARS = 200
_STACK_LINE = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_LIBRARY = os.path.dirname(os.__file__)


def crash_of(verdict: Verdict | None, found: Any, max_memory: int | None,
             stack: str = "", printed: str = "",
             scarcity: Scarcity | None = None) -> dict:
    """The error of a run whose child has ended so: kind, type, message, signal,
    exit_code, peak and cpu.

    `found` is its Exit, `stack` what faulthandler has dumped, `printed` what the run
    has printed.  Of who has ended with its nursery it is not known how: that alone
    could tell.
    """
    text, evidence = _verdict_words(verdict, found, max_memory), []
    if not text and found.signal == "SIGKILL":
        text, evidence = _kill_words(found, scarcity)
    elif not text:
        text = _signal_words(found.signal, stack, printed) if found.signal else \
            _exit_words(found.code)
        evidence = near_address_limit(found.peak_bytes)
    return {
        "kind": "crash", "type": found.signal or "",
        "message": text + bracketed(found, evidence), "signal": found.signal,
        "exit_code": found.code, **usage_parts(found),
    }


def usage_parts(found: Exit | None) -> dict:
    """What a process has used, as an error has it: peak, cpu; nothing if unknown."""
    if not (found and found.peak_bytes):
        return {}
    return {"peak": found.peak_bytes, "cpu": round(found.cpu, 3)}


def bracketed(found: Exit | None, evidence: Sequence[str] = ()) -> str:
    """What is put behind a sentence of a child that has died."""
    parts = []
    if found and found.peak_bytes:
        parts = [f"peak {size_text(found.peak_bytes)}", f"CPU {found.cpu:.1f} s"]
    parts[1:1] = evidence
    return f" ({', '.join(parts)})" if parts else ""


def _verdict_words(verdict, found, max_memory):
    """Why we have killed it, or nothing."""
    if verdict is Verdict.CUT_OFF or found.code == CUT_OFF_STATUS:
        return "the task has closed the connection of its process to the worker: did " \
            "it close descriptors that are not its own?"
    return {
        Verdict.MAD: "the child sent what is no message: did the task write to its "
                     "sockets?",
        Verdict.TOO_MUCH: "the worker lacks the memory to read its result",
        Verdict.MEMORY: f"it used more than max_memory, {(max_memory or 0) >> 20} MiB",
    }.get(verdict, "")


def _kill_words(found, scarcity):
    """Whom SIGKILL came from: (a sentence, the evidence for it)."""
    counter, kills, limit = scarcity or Scarcity()
    evidence = [f"{counter} oom_kill +{kills}"] if kills else []
    if limit and counter != "machine":
        evidence.insert(0, f"cgroup limit {size_text(limit)}")
    if not found.peak_bytes:
        text = "its nursery, the process that starts children, has ended, and this " \
            "child with it"
        return (text + ": out of memory", evidence) if kills else (text, [])
    if kills:
        return "out of memory", evidence
    if counter:
        return _FROM_OUTSIDE, [f"{counter} oom_kill +0"]
    if limit and found.peak_bytes >= NEAR * limit:
        return "out of memory, it seems", evidence
    return f"{_FROM_OUTSIDE}, or by the system for want of memory", []


def _signal_words(name, stack, printed):
    """segmentation fault in _rank at index.py:88"""
    text = SIGNAL_WORDS.get(name, "this signal ended the child")
    if stack.startswith("Fatal Python error"):
        text += _crash_place(stack)
    if name == "SIGABRT":
        lines = [line.strip() for line in printed.splitlines()[-5:]
                 if _ABORT_LINES.search(line)]
        said = " ".join(lines)[:_ABORT_CHARS]
        text += f": {said}" if said else ""
    return text


def _crash_place(stack):
    """Where a dumped stack was: in the innermost frame that is not Python's own."""
    crashed = stack.partition("Current thread")[2].partition("\n\n")[0]
    frames = _STACK_LINE.findall(crashed)
    if not frames:
        return ""
    own = [frame for frame in frames if "site-packages" in frame[0]
           or not frame[0].startswith((_LIBRARY, __file__, "<frozen"))]
    path, line, name = (own or frames)[0]
    return f" in {name} at {os.path.basename(path)}:{line}"


def _exit_words(code):
    if code is None:
        return "its process has ended, and somebody else has waited for it: how it " \
            "has ended is not known"
    return f"it ended its process with exit code {code}, as by os._exit()"


# == Deaths ===================================================================
# Owns what the end of a child means for the runs that were in flight in it: whom it
# is charged to, and in which words.
#
# Who ends a child costs itself a run, and its neighbours none.  Where it is known who
# did, by a time limit, a cancellation or a loop that was blocked, the others are
# forgiven: they run again, uncounted.  So is who came to its limit while another
# blocked its loop.  Where it is not known, all are forgiven and marked: each runs next
# in a child with nothing else in it, and who dies there, or with the mark upon it, is
# charged.  So what always crashes does so twice for the first time.  Who has been
# forgiven often enough is marked as well.

_OF_RUNS = (*OF_A_RUN, Verdict.STUCK)

# Forgiven so often, a run is spared neighbours: else one that always has to be killed
# takes it down each time, and it never comes to its end.
_MOST_FORGIVEN = 3

# Of several that are marked, and were each in a child of its own when the nursery of
# these died, one has killed it, or none.  So they are forgiven, but not for ever.
_MOST_SUSPECTED = 10

LOST_WITH = {       # why a run is lost, and not charged: (of whom is known, now alone)
    (True, False): "its child was killed because of another run: it runs again",
    (True, True): "its child was killed because of another run, and not for the first "
                  "time: it runs again, alone in a child",
    (False, True): "its child has died, and it is not known which run was to blame: "
                   "it runs again, alone in a child",
}


class Blame(NamedTuple):
    """Whom a death is charged to."""

    culprits: list[Slot]
    forgiven: list[Run]
    is_known: bool              # else the forgiven ones are suspects


def judge(members: Sequence[Member]) -> Blame:
    """Whom the death of these children, of one cause, is charged to."""
    slots = [slot for member in members for slot in member.slots()]
    runs = [run for member in members for run in member.runs()]
    verdicts = {member.verdict for member in members} - {None}
    by_run = [slot for slot in slots if slot.verdict]
    is_of_run = bool(by_run) or not verdicts.isdisjoint(_OF_RUNS)
    if is_of_run and verdicts.issubset(_OF_RUNS):   # one that has answered, perhaps
        blockers = [m.beside.blocker for m in members if m.beside.blocker]
        culprits = [slot for slot in by_run
                    if not any(m.beside.is_held_up(slot) for m in members)]
        culprits += [slot for slot in blockers if slot not in by_run]
        is_known = True
    else:
        is_known = len(runs) < 2
        culprits = slots if is_known else [s for s in slots if s.run and s.run.alone]
        if len(culprits) > 1:
            culprits = [s for s in culprits
                        if s.run and s.run.forgiven >= _MOST_SUSPECTED]
    charged = {slot.run for slot in culprits}
    return Blame(culprits, [run for run in runs if run not in charged], is_known)


def pardon(run: Run, is_known: bool) -> str:
    """Have a run that is not charged run again.  Returns why it was lost."""
    run.alone |= not is_known or run.forgiven >= _MOST_FORGIVEN
    run.pardoned = LOST_WITH[is_known, run.alone]
    return run.pardoned


def deaths_of(members: Sequence[Member], blame: Blame, limits: types.SimpleNamespace,
              at: float) -> tuple[list[Ended], dict]:
    """How the runs ended that this is charged to; what to say of the death itself, if
    nobody can be charged with it alone.
    """
    ended, about, others = [], {}, len(blame.forgiven)
    stacks = [member.read_stack() for member in members]
    if others and not blame.is_known:
        count = others + len(blame.culprits)
        about = {"runs": count, **death_of_many(members, count, stacks[0], limits)}
    for member, stack in zip(members, stacks):
        ended += [death_of(member, slot, stack, limits, at, others)
                  for slot in member.slots() if slot in blame.culprits]
    return ended, about


def death_of_many(members: Sequence[Member], runs: int, stack: str,
                  limits: types.SimpleNamespace) -> dict:
    """The fields of child_error for a death that nobody can be charged with alone.

    `stack` is that of the first.
    """
    first, *others = members
    crash = crash_of(first.verdict, first.process.exit, limits.max_memory, stack,
                     first.slot.text(), first.scarcity)
    many = f"{len(members)} children have died" if others else "a child has died"
    how = ": ".join(filter(None, (crash["type"], crash["message"])))
    return {
        "pid": first.process.pid, "stack": stack or None,
        "error": f"{many} with {runs} runs in flight: {how}; it is not known which of "
                 "them was to blame, so each runs again, alone in a child",
    }


def death_of(member: Member, slot: Slot, stack: str, limits: types.SimpleNamespace,
             at: float, others: int = 0) -> Ended:
    """How the run of this slot ended, which this death is charged to.

    So many others were in flight, and are not.
    """
    run, verdict, found = slot.run, slot.verdict, member.process.exit
    assert run is not None
    printed = member.finish(slot)
    error: dict = {"traceback": stack, "retryable": True}
    if member.verdict and member.verdict not in _OF_RUNS:
        verdict = member.verdict
    if verdict is Verdict.CANCELLED:
        error.update(kind="cancelled", message="cancelled, and killed")
    elif verdict is Verdict.TIMEOUT:
        message = f"killed after its limit of {run.timeout:g} s" + bracketed(found)
        error.update(kind="timeout", message=message, **usage_parts(found))
    elif member.beside.blocker is slot and member.why in _OF_RUNS:
        message = "killed: it blocked the event loop of its child, in which other " \
            "runs could not be ended any more" + bracketed(found)
        error.update(kind="crash", type="", message=message, signal="SIGKILL",
                     exit_code=None, **usage_parts(found))
    else:
        error.update(crash_of(member.verdict, found, limits.max_memory, stack, printed,
                              member.scarcity))
    if others and error["kind"] != "cancelled":
        error["message"] += charged_among(others, slot)
    return Ended(run, error["kind"], None, error, printed, None, at - slot.began)


def charged_among(others: int, slot: Slot) -> str:
    """Why the run of this slot is charged, and so many others in flight are not."""
    are = "1 other run was" if others == 1 else f"{others} other runs were"
    known = slot.verdict or not (slot.run and slot.run.alone)
    why = "" if known else "a child has died with it before; "
    return f"; {why}{are} in flight with it, and not to blame"


# == Crew =====================================================================
# Owns which children there are: as many as should be, started few at a time, watched,
# and removed when they are dead.  Knows nothing of what they run.

_START_SECONDS = 2.0        # a child that imports for longer holds up no others
_WANED_FOR_EACH = 8         # children that retire, but have runs, for each that works
_STEADY_SECONDS = 0.5       # a child that was ready for so long could start
_STEADY_NURSERY_SECONDS = 10.0      # … and the app of a nursery is sound
_LACK_PAUSE = 5.0           # seconds, at most, until a lack is tested again
_START_FAILURES = 5         # children in a row that die before they are ready


class Starts:
    """When children may be started: few at a time, none once a stop has begun.

    When they die before they are ready: later each time, then give up; but never for
    want of memory, descriptors or processes.
    """

    def __init__(self, say: Callable):
        self._say = say         # say(text, **fields): of a child outside of any run
        self.failures = 0       # in a row
        self.next_start = 0.0   # no child is started before
        self._reason = ""       # of the last failure
        self.trouble = ""       # why the last could not start; none after a success
        self._lacks = 0         # times in a row that something was lacking
        self._last_nursery = self._next_nursery = -math.inf     # started; not before
        self._falls = 0         # of nurseries that lived for seconds only, in a row
        self._slow: set[int] = set()        # pids that were said to be

    @property
    def given_up(self) -> str:
        """Why no more are worth a try; empty before, and after a success."""
        return self._reason if self.failures >= _START_FAILURES else ""

    def room(self, members: Sequence[Member], at: float) -> int:
        """How many more may be started now, beside these.

        The import of the app takes a CPU for a while: as many as there are CPUs.
        Those that take long may be waiting for something else.
        """
        if at < self.next_start:
            return 0
        starting = [m for m in members if not m.ready and at - m.began < _START_SECONDS]
        return max(0, (os.cpu_count() or 1) + 1 - len(starting))

    def may_be_nursery(self, at: float) -> bool:
        """True when a nursery is to be started now.

        The third that dies within seconds, and those that come after it, wait.
        """
        if at < max(self.next_start, self._next_nursery):
            return False
        since, self._last_nursery = at - self._last_nursery, at
        self._falls = self._falls + 1 if since < _STEADY_NURSERY_SECONDS else 0
        if self._falls > 1:
            self._next_nursery = at + min(0.1 * 2 ** self._falls, _LACK_PAUSE)
        return True

    def end(self) -> None:
        """None is started any more."""
        self.next_start = math.inf

    def failed(self, at: float, reason: str) -> None:
        """One more could not start, for this reason.  Said once."""
        self.failures += 1
        lines = reason.strip().splitlines() or ["it ended before it was ready"]
        self.trouble = lines[-1]
        if self.failures == 1:
            self._say(f"a child could not start, it is tried again: {lines[-1]}",
                      stack=reason if len(lines) > 1 else None)
        pause = 0.1 * 2 ** min(self.failures, 8)
        self.next_start = max(self.next_start, at + pause)
        self._reason = reason

    def lacked(self, at: float, reason: str) -> None:
        """One more could not start, for want of what there may be later.  Said once."""
        self._lacks += 1
        self.trouble = (reason.strip().splitlines() or ["something is lacking"])[-1]
        pause = min(0.1 * 2 ** min(self._lacks, 8), _LACK_PAUSE)
        self.next_start = max(self.next_start, at + pause)
        if self._lacks == 1:
            self._say(f"no child can be started, it is tried again: {reason}")

    def ended(self, member: Member, at: float) -> None:
        """A child has died; what it had not begun was taken back."""
        was_idle = member.is_idle
        was_used = member.done or not was_idle or at - member.began > _STEADY_SECONDS
        if member.is_retiring or member.ready and was_used:
            # Whether another can start is found out now, not by earlier tries.
            # Guarded by test_a_crash_while_no_spare_can_start_is_survived.
            self.failures = 0
            if self.next_start < math.inf:
                self.next_start = at
        elif member.has_lacked():
            self.lacked(at, member.last_words())
        else:
            self.failed(at, member.last_words())
        if member.phase is Phase.READY and was_idle and not member.why:
            about = crash_of(None, member.process.exit, 0, "", "",
                             member.scarcity)["message"]
            self._say(f"a child has ended while it had nothing to do: {about}",
                      pid=member.process.pid)

    def mention_slow(self, members: Sequence[Member], at: float) -> None:
        """Say once of each child that it imports the app for long, and where it is."""
        starting = [m for m in members if not m.ready]
        for member in starting:
            pid = member.process.pid
            if pid in self._slow:
                continue
            slow, stack = is_slow(member.began, at, member.read_stack)
            if slow:
                self._say(f"a child is not ready after {SLOW_SECONDS:g} s: it still "
                          "imports the app, and is waited for", pid=pid,
                          stack=stack or None)
                self._slow.add(pid)
        self._slow.intersection_update(member.process.pid for member in starting)

    def succeeded(self) -> None:
        """One is ready: earlier failures do not count any more."""
        self.failures = self._lacks = 0
        self.trouble = ""


class Crew:
    """`size` children, and one more that is warm."""

    def __init__(self, nursery: Nursery, size: int, log: Callable,
                 selector: selectors.BaseSelector, begun: Begun, threads: int = 1):
        self.nursery, self._size, self.begun = nursery, size, begun
        # Each has a place at least: when all threads are there, nothing can be done.
        self._most_waned = size * max(threads, _WANED_FOR_EACH)
        self._log = log             # log(event, run, **fields)
        self.selector = selector
        self.members: list[Member] = []
        self.unknown: set[str] = set()      # names of tasks that a child did not know
        self.oom_kills = OomKills()
        self.starts = Starts(
            lambda error, **more: log("child_error", None, error=error, **more)
        )

    def fill(self, at: float) -> None:
        """Have all the processes there should be; but few start at a time.

        The others follow as these get ready.
        """
        try:
            if not self._has_nursery(at):
                return
            staying = sum(m.phase is not Phase.LEAVING for m in self.members)
            # What runs beside in one that retires may take long, and few places: so
            # others do its work.  Guarded by
            # test_long_runs_in_children_that_retire_keep_nobody_waiting.
            waned = sum(m.phase is Phase.RETIRING and bool(m.beside)
                        for m in self.members)
            missing = self._size + 1 - staying + min(waned, self._most_waned)
            for _ in range(min(missing, self.starts.room(self.members, at))):
                spec = self.nursery.spec._replace(begun=self.begun.fd)
                member = Member(self.nursery, spec, self._log, at)
                member.watch(self.selector)
                self.members.append(member)
        except ConnectionError:     # the nursery has died; how is heard in a moment
            pass
        except OSError as exc:
            tell = self.starts.lacked if is_lack(exc) else self.starts.failed
            tell(at, str(exc))

    def attend(self, at: float) -> None:
        """Hear the nursery; if it has got the app just now, or has died, go on."""
        could_bear = self.nursery.can_bear
        self.nursery.hear()
        if could_bear != self.nursery.can_bear or self.nursery.failure:
            self.fill(at)

    def _has_nursery(self, at):
        """True when there is one that has the app; else one is started, in its turn."""
        nursery = self.nursery
        nursery.hear()
        nursery.mind(at)
        failure, nursery.failure = nursery.failure, None
        if failure:
            tell = self.starts.lacked if failure.lacks else self.starts.failed
            tell(at, "\n".join(filter(None, (failure.stack, failure.text))))
        if nursery.process is None and self.starts.may_be_nursery(at):
            nursery.start(at, self.selector)
        return nursery.can_bear

    def is_ready(self) -> bool:
        """True when a child has imported the app."""
        return any(member.ready for member in self.members)

    def welcome(self, member: Member, names: set[str], most_bytes: int | None,
                at: float) -> bool:
        """One has imported the app, which knows these tasks.

        False when that alone takes too much memory, as all would that replace it.
        """
        if member.outgrows(most_bytes):
            return False
        member.phase = Phase.READY
        self.nursery.has_served = True
        member.read_stack()         # of a slow import: not of a crash to come
        self.starts.succeeded()
        self.unknown -= names
        self.fill(at)
        return True

    def note_killed(self, dead: Sequence[Member]) -> None:
        """Find out whether want of memory has killed these, all of one cause."""
        end = dead[0].process.exit
        if not dead[0].why and end and end.signal == "SIGKILL":
            scarcity = self.oom_kills.evidence()
            for member in dead:
                member.scarcity = scarcity

    def remove(self, member: Member) -> None:
        """It is dead: let go of what is left of it."""
        member.close(self.selector)
        self.members.remove(member)

    def stop(self) -> None:
        """End the idle children, and the nursery."""
        until = time.monotonic() + EXIT_GRACE
        for member in self.members:
            member.wire.hang_up()
        for member in list(self.members):
            member.wait(until - time.monotonic())
            self.remove(member)
        self.nursery.stop(EXIT_GRACE)


# == Dispatch =================================================================
# Owns the claimed runs that no child has, and gives each to one that has a place of
# its kind; takes back from a child what it has not begun.

_HAND_SECONDS = 0.05        # claimed runs that no child takes go back after this


def _urgency(run):
    return run.priority


class Hand:
    """Claimed runs that no child has, in the order in which they go to one."""

    def __init__(self):
        self.runs: collections.deque = collections.deque()
        self._held: dict[Run, float] = {}   # since when no child could take it

    def __len__(self) -> int:
        return len(self.runs)

    def add(self, runs: Sequence[Run]) -> None:
        """Take in runs, the most urgent first."""
        self.runs.extend(runs)
        if len(self.runs) > len(runs):
            self.runs = collections.deque(sorted(self.runs, key=_urgency))

    def put_in_front(self, runs: Sequence[Run]) -> None:
        """Take in what has been recalled from a child."""
        for run in runs:
            self._held.pop(run, None)
        self.runs.extendleft(reversed(runs))

    def take(self, wanted: Callable[[Run], bool]) -> list[Run]:
        """Give away the runs that are wanted."""
        found = [run for run in self.runs if wanted(run)]
        if found:
            self.runs = collections.deque(r for r in self.runs if not wanted(r))
        return found

    def deal(self, send: Callable[[Run], bool], at: float) -> list[Run]:
        """Give each run away with `send`, if it can.

        Returns the runs that nobody could take for a while: others may have time, and
        what is more urgent is not looked for while these are here.
        """
        left = [run for run in self.runs if not send(run)]
        held = self._held = {run: self._held.get(run, at) for run in left}
        self.runs = collections.deque(r for r in left if at < held[r] + _HAND_SECONDS)
        return [run for run in left if at >= held[run] + _HAND_SECONDS]

    @property
    def due(self) -> float:
        """When deal() gives up on one of those that are left."""
        return min((self._held.get(run, 0.0) for run in self.runs),
                   default=math.inf) + _HAND_SECONDS

    def empty(self) -> list[Run]:
        """Give all away."""
        runs, self.runs = list(self.runs), collections.deque()
        return runs


class Dispatch:
    """What a pool has in hand, and the children that it goes to."""

    def __init__(self, crew: Crew, placement: Placement, durations: Durations,
                 kinds: Kinds):
        self.crew = crew
        self.members = crew.members             # the same list
        self.hand = Hand()
        self.placement, self.durations = placement, durations
        self._kinds = kinds
        self._due: dict[Member, float] = {}     # when each has to be looked after

    def take(self, runs: Sequence[Run]) -> None:
        """Have claimed runs in hand, the most urgent first; none waits for others."""
        urgent = [run.priority for run in runs if run.name not in self._kinds.is_async]
        if urgent:
            for member in self.placement.less_urgent(self.members, min(urgent)):
                self._recall(member)
        self.hand.add(runs)

    def make_way(self, priority: int) -> list[Run]:
        """Take back what has not begun and is less urgent: another needs a child.

        Guarded by test_an_urgent_task_does_not_wait_for_what_was_prefetched.
        """
        return self._withdraw(lambda run: run.priority > priority)

    def take_back(self, queues: set[str]) -> list[Run]:
        """Take back what has not begun and is of these queues: they are paused."""
        return self._withdraw(lambda run: run.queue in queues)

    def _withdraw(self, unwanted):
        for member in [m for m in self.members if len(m.waiting) > 1]:
            if any(map(unwanted, itertools.islice(member.waiting, 1, None))):
                self._recall(member)
        return self.hand.take(unwanted)

    def in_hand(self) -> int:
        """Runs that are claimed and not ended."""
        return len(self.hand) + sum(
            [len(m.waiting) + len(m.beside) for m in self.members])

    def running(self) -> list[Run]:
        """The runs in flight in all children."""
        return [slot.run for m in self.members for slot in m.slots() if slot.run]

    def room(self, places: Places) -> Room:
        """How many runs could be claimed: what is in hand comes first."""
        if not self.hand:
            return places.room
        asyncs = sum(run.name in self._kinds.is_async for run in self.hand.runs)
        return places.room.less(len(self.hand) - asyncs, asyncs)

    def dispatch(self, places: Places, at: float) -> list[Run]:
        """Send what is in hand, to the child that will begin it first.

        Returns those that none could take for a while.  `places` are balance()'s.
        """
        send = self._send if self._kinds.is_plain else self._send_by_kind
        return self.hand.deal(functools.partial(send, places, at), at)

    def _send_by_kind(self, places, at, run):
        is_coroutine = run.name in self._kinds.is_async
        if run.alone:
            return self._send_alone(places, at, run, is_coroutine)
        if is_coroutine:
            return self._send_beside(places.loops, at, run, True)
        if self._kinds.threads > 1:
            return self._send_beside(places.threads, at, run, False)
        while places.takers and places.takers[0][-1].is_taken:      # in this turn
            heapq.heappop(places.takers)
        return self._send(places, at, run)

    def _send(self, places, at, run):
        """Send a run to the first of the takers, if that can take it."""
        takers, cell = places.takers, self.crew.begun.give(run)
        if not takers or cell is None:
            return False
        delay, has, number, member = takers[0]
        if has and (run.alone or not self.placement.may_wait(
                run, cell, delay, has, member)):
            return False
        if not self._send_main(member, run, cell, delay, at):
            heapq.heappop(takers)           # its socket is full, or it just died
            return self._send(places, at, run)
        if run.name in self.durations.short_names and not run.alone:
            heapq.heapreplace(takers, (delay + run.usual, has + 1, number, member))
        else:
            heapq.heappop(takers)           # nothing shall wait behind this one
        return True

    def _send_main(self, member, run, cell, delay, at):
        run.usual, run.due = self.durations.usual(run.name), at + delay
        if not member.send(run, at, cell):
            return False
        if len(member.waiting) == 1:        # now: there may have been a recall
            member.slot.announce()
        if len(member.waiting) <= 2:        # more of them change nothing
            self._changed(member, at)
        return True

    def _send_beside(self, heap, at, run, is_coroutine):
        """Send a run to the threads, or the loop, with the fewest."""
        cell = self.crew.begun.give(run)
        while heap and cell is not None:
            has, number, room, member = heap[0]
            if room > 0 and not member.is_taken \
                    and member.send_beside(run, is_coroutine, at, cell):
                heapq.heapreplace(heap, [has + 1, number, room - 1, member])
                if self.placement.left(member) <= 0:    # some of them may take long
                    member.phase = Phase.RETIRING
                    self.crew.fill(at)
                self._changed(member, at)
                return True
            heapq.heappop(heap)             # full, or it just died
        return False

    def _send_alone(self, places, at, run, is_coroutine):
        """Send a run to a child in which nothing is in flight: the spare, at best."""
        cell = self.crew.begun.give(run)
        while places.empty and cell is not None:
            member = places.empty.pop()
            if not member.is_idle:          # something went there in this very turn
                continue
            if is_coroutine or self._kinds.threads > 1:
                is_sent = member.send_beside(run, is_coroutine, at, cell)
                self._changed(member, at)
            else:
                is_sent = self._send_main(member, run, cell, 0.0, at)
            if is_sent:
                return True
        return False

    def _changed(self, member, at):
        member.mind_output(self.crew.selector, at)
        self._mark(member)

    def balance(self, at: float) -> Places:
        """The places there are, once nothing waits behind a slow run for nothing."""
        places = self.placement.survey(self.members, at)
        overloaded = places.overloaded(is_spare=not self.hand)
        for member in overloaded:
            self._recall(member)
        return self.placement.survey(self.members, at) if overloaded else places

    def _recall(self, member):
        self.hand.put_in_front(member.recall())
        self._mark(member)

    def recall_all(self) -> list[Run]:
        """Take back all that has not begun: for a stop."""
        for member in self.members:
            self._recall(member)
        return self.hand.empty()

    def _mark(self, member):
        """The child has changed: find out when something is due in it."""
        if member in self.members:
            self._due[member] = self.placement.next_due(member)

    def next_timer(self) -> float:
        """When enforce(), balance() or dispatch() has something to do, or before."""
        return min(*self._due.values(), self.hand.due, math.inf)


# == Pool =====================================================================
# Owns who runs what: time limits, recall of what has not begun, what becomes of a run
# whose child dies.  Knows nothing of the database: returns runs that have ended, as
# Ended records, and those that are forgiven.

_TIMEOUT_GRACE = 1.0        # seconds to clean up after TaskTimeout
_CANCEL_GRACE = 0.5         # seconds to clean up after TaskCancelled
_STACK_GRACE = 0.05         # seconds for a stuck child to dump its Python stack
_OWN_LIMIT_SECONDS = 0.1    # a thread, or a loop, is itself first to mind a limit
_LAG_SILENCE = 60.0         # between two lines on a task that blocks an event loop
_MEMORY_MARGIN = 1.25       # of max_memory: a child with many runs may wait for
                            # their ends until it takes so much


class Collected(NamedTuple):
    """What has become of runs."""

    ended: list[Ended]
    forgiven: list[Run]         # they had begun, and are to run again, uncounted
    progress: dict[int, tuple[Run, str]]    # by id: how far others have come


class Pool(Dispatch):
    """The children of a worker, and the runs that they have."""

    def __init__(self, nursery: Nursery, size: int, limits: types.SimpleNamespace,
                 log: Callable, selector: selectors.BaseSelector,
                 begun: Begun | None = None, kinds: Kinds = Kinds()):
        durations = Durations()
        super().__init__(
            Crew(nursery, size, log, selector, begun or Begun(), kinds.threads),
            Placement(size, limits.max_tasks_per_child, durations, kinds),
            durations, kinds)
        self._limits = limits       # settings
        self._log = log             # log(event, run, **fields)
        self._ended: list[Ended] = []           # since the last collect()
        self._forgiven: list[Run] = []          # the same
        self._progress: dict[int, tuple[Run, str]] = {}     # the same
        self._lag_said: dict[str, float] = {}   # by name of the task: when

    def receive(self, heard: Sequence[tuple], at: float) -> None:
        """Read from the (member, descriptor) that the selector named."""
        for member, _ in heard:         # first: what has ended by now, wrote before
            if member in self.members:
                self._hear(member, at)
                if member in self.members and not member.is_idle:   # else it may get
                    member.mind_output(self.crew.selector, at)      # some in this turn
                self._mark(member)
        for member, fd in heard:
            is_output = fd == member.pipe.fd and member in self.members
            if is_output and member.is_settled(at):
                member.read_output()

    def _hear(self, member, at):
        alive, wrong = self._listen(member, at)
        if wrong:
            self._condemn(member, wrong, at)
        if not alive:           # dead, or it closed its socket, which is as good
            member.wait(0.1, Verdict.CUT_OFF)
            self._bury(member, at)

    def _listen(self, member, at):
        """Take in what a child said; return what hear() does."""
        said = Said([], self._progress, [], [], [])
        found = hear(member, said, self._limits.max_payload, at)
        for names in said.tasks:
            if not self.crew.welcome(member, names, self._limits.max_memory, at):
                self._condemn(member, Verdict.MEMORY, at)
        for lag in said.lags:
            self._note_lag(member, *lag, at)
        for run, left in said.spent:
            self._log("child_error", run, pid=member.process.pid,
                      error=f"the child is replaced: {left}")
            if member.phase is Phase.READY:
                self._retire(member)
        for end in said.ended:
            self._note_end(member, end)
        self._ended += said.ended
        return found

    def _note_end(self, member, end):
        name = end.run.name
        if end.kind == "unknown":
            self.crew.unknown.add(name)
            return
        is_coroutine = name in self._kinds.is_async
        if not is_coroutine:        # nothing waits for one of those
            self.durations.learn(name, end.duration or 0.0)
        if end.kind in ("timeout", "cancelled") and not is_coroutine \
                or member.done >= (self._limits.max_tasks_per_child or math.inf):
            self._retire(member)    # with what an interrupted task has started

    def _note_lag(self, member, run, seconds, stack, at):
        """A run blocks its event loop: what waits there goes elsewhere."""
        self._recall(member)
        if at >= self._lag_said.get(run.name, -math.inf) + _LAG_SILENCE:
            self._lag_said[run.name] = at
            self._log("loop_lagged", run, seconds=round(seconds, 3), stack=stack)

    def collect(self) -> Collected:
        """What has become of runs since the last call."""
        found = Collected(self._ended, self._forgiven, self._progress)
        self._ended, self._forgiven, self._progress = [], [], {}
        return found

    def enforce(self, at: float) -> None:
        """Time limits, and the end of those whose grace is over."""
        for member in [member for member, due in self._due.items() if due <= at]:
            self._enforce_on(member, at)
            self._mark(member)

    def _enforce_on(self, member, at):
        member.mind_output(self.crew.selector, at)
        if member.beside or member.beside.shut_until:
            self._enforce_beside(member, at)
        if member.kill_due and at >= member.kill_due:
            self._kill(member, at)
        elif member.waiting:
            head, age = member.waiting[0], at - member.slot.began
            if age >= STALL_SECONDS:
                member.slot.announce()
            if head.timeout and age >= head.timeout:
                self._condemn(member, Verdict.TIMEOUT, at, _TIMEOUT_GRACE)
        elif member.phase is Phase.RETIRING and member.is_idle:
            member.leave(at + EXIT_GRACE)

    def _enforce_beside(self, member, at):
        """What is due in the threads, and on the loop."""
        if at >= member.beside.shut_until:
            member.beside.shut_until = 0.0
        for slot in member.beside.due(at):
            if slot.run is not None:        # else it was read back just now
                self._enforce_slot(member, slot, at)

    def _enforce_slot(self, member, slot, at):
        age, next_age = at - slot.began, math.inf
        slot.announce()
        if slot.run.timeout:
            next_age = slot.run.timeout + _OWN_LIMIT_SECONDS
        if age >= next_age:
            grace = _TIMEOUT_GRACE - _OWN_LIMIT_SECONDS
            return self._condemn(member, Verdict.TIMEOUT, at, grace, slot)
        if slot.is_coroutine and age < UNTAKEN_SECONDS:
            next_age = min(next_age, UNTAKEN_SECONDS)
        elif slot.is_coroutine:
            self.hand.put_in_front(member.recall_untaken(at))
            member.beside.was_taken(slot)
        if slot.run and next_age < math.inf:
            member.beside.note(slot.began + next_age, slot)

    def _retire(self, member):
        """Replace it once it has nothing to do."""
        self._recall(member)
        member.phase = Phase.RETIRING
        self._mark(member)

    def _condemn(self, member, verdict, at, grace=0.0, slot=None):
        """Kill it in `grace` seconds, unless it answers before.

        About a run: unless the run of this slot ends, that of its main thread if
        none is given.
        """
        slot = slot or member.slot
        if member.verdict or (slot if verdict in OF_A_RUN else member).kill_due:
            return
        self._recall(member)        # so that nothing else can begin in it
        member.condemn(verdict, at + grace, slot)
        self._mark(member)

    def _kill(self, member, at):
        """Kill it with its group; a stuck one first dumps its Python stack."""
        is_stuck = Verdict.TIMEOUT in [slot.verdict for slot in member.slots()]
        if is_stuck and not member.verdict:
            member.condemn(Verdict.STUCK, at + _STACK_GRACE)
            member.process.signal(signal.SIGUSR2)
        else:
            self._hear_last(member, at)
            self._bury(member, at)

    def _hear_last(self, member, at):
        """Take in the answers that were sent before the end, which is now."""
        member.wait(0)
        _, wrong = self._listen(member, at)
        member.verdict = member.why or wrong

    def notice_deaths(self, at: float) -> None:
        """Find the dead whose socket a grandchild keeps open."""
        for member in list(self.members):
            if member.process.poll():
                self._hear_last(member, at)
                self._bury(member, at)

    def _bury(self, member, at):
        """A child is dead: settle its runs, free its sockets, start another.

        With its nursery all have died that it had, of one cause that is not known.
        """
        if member not in self.members:
            return
        dead, is_orphan = [member], member.process.is_orphan
        if is_orphan:
            dead += [m for m in self.members if m.process.is_orphan and m is not member]
        for each in dead:
            if each is not member:
                self._hear_last(each, at)
            self._recall(each)
            each.read_output()
        self.crew.note_killed(dead)
        if not is_orphan:
            self.crew.starts.ended(member, at)
        self._charge(dead, at)
        for each in dead:
            self.crew.remove(each)
            self._due.pop(each, None)
        self.crew.fill(at)

    def _charge(self, members, at):
        """End, or give back, what was in flight in these dead children."""
        blame = judge(members)
        ended, about = deaths_of(members, blame, self._limits, at)
        if about:
            self._log("child_error", None, **about)
        self._ended += ended
        for run in blame.forgiven:
            self._log("task_lost", run, reason=pardon(run, blame.is_known))
        self._forgiven += blame.forgiven

    def cancel(self, run_id: int, at: float) -> None:
        """End a run: an exception in the task, then, after a grace, a kill."""
        for member in self.members:
            if run_id in [run.id for run in member.runs()]:
                self._recall(member)        # it may not have begun
                slot = member.slot_of(run_id)
                if slot and not (slot.kill_due or member.verdict):
                    self._condemn(member, Verdict.CANCELLED, at, _CANCEL_GRACE, slot)
                    member.interrupt(run_id)
        found = self.hand.take(lambda run: run.id == run_id)
        self._ended += [Ended(run, "cancelled") for run in found]

    def check_memory(self, at: float) -> None:
        """Replace children over the memory limit; kill those that are at work.

        One with many runs waits for their ends, unless it grows on.
        """
        limit = self._limits.max_memory
        for member in list(self.members) if limit else []:
            taken = memory_bytes(member.process.pid)
            if taken <= limit or member.phase is Phase.LEAVING:
                continue
            many = len(member.slots()) > 1 and taken <= limit * _MEMORY_MARGIN
            if member.phase is Phase.READY and (member.is_idle or many):
                self._retire(member)
            elif member.is_idle and member.is_retiring or many:
                pass
            elif member.ready or member.outgrows(limit):
                self._condemn(member, Verdict.MEMORY, at)

    def interrupt(self, at: float, idle: bool = False) -> list[Run]:
        """Kill all children; the idle may end well, else.  Returns what ran."""
        runs: list[Run] = []
        for member in [m for m in self.members if idle or not (m.is_idle and m.able)]:
            self._hear_last(member, at)
            runs += member.runs()
            self.crew.remove(member)
            self._due.pop(member, None)
        return runs


# == Liveness =================================================================
# Owns the worker's entry among the workers: its id, its lock in DATABASE-live, its
# cells, its heartbeat, and the judgement that another is dead.  A dead worker's
# tasks go on within a second.


def _open_live(path, may_create):
    """Open, or make, DATABASE-live.

    Whoever can open it, be it to read, can lock a byte and hide a death.
    """
    create = os.O_CREAT if may_create else 0
    try:
        fd, is_ours = open_beside(path.removesuffix("-live"), path, os.O_RDWR | create)
    except OSError as exc:
        raise DatabaseUnavailable(
            f"{path}: {exc.strerror}: a worker must be able to lock this file, and it "
            "must not be a link"
        ) from None
    if not is_ours or os.fstat(fd).st_size:
        close_fd(fd)
        raise DatabaseUnavailable(
            f"{path}: somebody else has put this here: remove it, once no worker runs"
        )
    return fd


class LiveFile:
    """Byte n of the file `path` is locked for as long as worker n lives.

    The kernel drops the lock with the process, so a death shows at once and no
    clock is asked.  The file is opened once per process and never closed: closing
    any descriptor of it would drop all locks.  A lock does not keep out its own
    process, so `_held` knows the bytes that are ours.

    Somebody may remove the file: then those who come next lock a new one, and a
    free byte there says nothing about a worker that has locked another `number`.
    """

    _open: dict[tuple | None, LiveFile] = {}        # by device and inode

    def __init__(self, path: str, may_create: bool = True):
        self._fd, self._path = _open_live(path, may_create), os.path.realpath(path)
        self._pid = os.getpid()
        self._held: set[int] = set()
        # Fits an integer of SQLite; unique while one of those who lock it lives.
        self.number = os.fstat(self._fd).st_ino & (1 << 62) - 1

    @classmethod
    def of(cls, path: str, may_create: bool = True) -> LiveFile:
        """The one instance for this file in this process, by whatever name."""
        known = cls._open.get(file_identity(path))
        if known is None or known._pid != os.getpid():
            cls._close_removed()
            known = cls(path, may_create)
            found = os.fstat(known._fd)
            cls._open[found.st_dev, found.st_ino] = known
        return known

    @classmethod
    def _close_removed(cls):
        """Nobody asks for what lies in a removed file, once we hold nothing there."""
        for identity, known in list(cls._open.items()):
            with contextlib.suppress(OSError):
                if not (known._held or os.fstat(known._fd).st_nlink):
                    close_fd(known._fd)
                    del cls._open[identity]

    def hold_only_here(self, worker: int) -> None:
        """Drop its lock in a file that was removed: its row tells of this one."""
        for other in list(self._open.values()):
            if other is not self and other._path == self._path:
                other.drop(worker)

    def hold(self, worker: int) -> bool:
        """Lock our byte.  False: it is somebody else's, so no proof that we live."""
        self._held.add(worker)
        return self._try_lock(worker) is not False

    def drop(self, worker: int) -> None:
        """Unlock it, when the worker has ended in an orderly way."""
        self._held.discard(worker)
        with contextlib.suppress(OSError):
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, worker)

    def is_held(self, worker: int) -> bool | None:
        """True when a process holds this byte; None where locks do not work."""
        if worker in self._held:
            return True
        free = self._try_lock(worker)
        if free:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, worker)
        return None if free is None else not free

    def _try_lock(self, worker):
        """True: it is locked now; False: somebody else's; None: it cannot be."""
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, worker)
            return True
        except OSError as exc:
            return False if exc.errno in (errno.EACCES, errno.EAGAIN) else None


def is_surely_dead(row: WorkerRow, locks: LiveFile, machine: tuple) -> bool:
    """True when the kernel says so: by its lock, or by a restart of `machine`.

    A lock tells only of those who have locked the same file, and '' is no boot: who
    cannot read it is not from another one.  False: its heartbeats have to tell.
    """
    held = locks.is_held(row.id) if row.live == locks.number else None
    if held is not None:
        return not held
    host, boot = machine
    return row.host == host and "" not in (row.boot, boot) and row.boot != boot


_REAP_ROWS = 200            # workers that one look for dead ones is about
_REAP_WORKERS = 10          # … and those of them whose runs it gives back
_LAST_GASP = 2.0            # seconds that the children of a killed worker may live


def judge_of(store: Store) -> Callable[[WorkerRow], bool]:
    """A function that tells of a worker's row whether the kernel knows it is dead."""
    if fcntl is None:
        return lambda row: False
    try:
        locks = LiveFile.of(store.path + "-live", may_create=False)
    except DatabaseUnavailable:         # none, or not ours: the heartbeat has to do
        return lambda row: False
    machine = socket.gethostname(), boot_id()
    return lambda row: is_surely_dead(row, locks, machine)


def reap_surely_dead(store: Store, now: int) -> None:
    """Give back what the dead still hold, where no worker is there to notice it."""
    is_dead = judge_of(store)
    for row in store.workers():
        if is_dead(row):
            begun = _last_begun(store.path, row.id)
            with contextlib.suppress(DatabaseBusy):     # then a worker does it
                if store.reap(row.id, row.name, now, row.beat_at, begun):
                    forget_begun(store.path, [row.id])


def _last_begun(path, worker):
    """What its children had begun, once all are dead; None: nobody can tell."""
    deadline = time.monotonic() + _LAST_GASP
    while True:
        is_over, begun = read_begun(path, worker)
        if is_over or time.monotonic() >= deadline:
            return begun
        own_sleep(0.01)


class Liveness:
    """One worker's place in bg_worker."""

    def __init__(self, store: Store, settings: types.SimpleNamespace, ear: WakeSocket,
                 tasks: dict[str, Entry] | None = None):
        self.store, self.settings, self._ear = store, settings, ear
        self._tasks = tasks or {}       # that it knows, by name
        self.id = 0                     # bg_worker.id; 0: not registered
        self._start_method = ""         # of children, and why
        self._machine = socket.gethostname(), boot_id()
        self._locks: Any = None         # LiveFile, from register() on
        self.begun = Begun()            # open from register() on
        self._dying: dict[int, float] = {}      # dead, but not its children: since
        self._seen: dict[int, tuple] = {}       # worker: (beat_at, seen when awake)
        self._cursor = 0                # the last worker looked at; 0: all were
        self._awake = 0.0               # seconds of turns; a long one counts as 1
        self.turn_began = time.monotonic()      # the last; for others to watch

    def register(self, now: int, start_method: str = "") -> None:
        """Get a new id, with its byte locked.  What is once said stays so."""
        self._start_method = start_method or self._start_method
        s, (host, boot) = self.settings, self._machine
        self._locks = LiveFile.of(self.store.path + "-live")
        row = {
            "name": s.worker_name, "pid": os.getpid(), "host": host, "boot": boot,
            "port": self._ear.port, "token": self._ear.token,
            "queues": json.dumps(s.queues) if s.queues else None,
            "concurrency": s.concurrency, "now": now, "live": self._locks.number,
            "start_method": self._start_method, "max_memory": s.max_memory,
            "timeout": s.timeout, "rate": s.rate_limit, "version": __version__,
            "tasks": [KnownTask(0, t.name, t.rate_limit, t.parameters, t.max_running)
                      for t in self._tasks.values()],
        }
        self.id = self.store.add_worker(row, self._locks.hold)
        self.begun.open(self.store.path, self.id, most_in_flight(s))
        left = begun_left(self.store.path)      # before we look who there is
        known = {*self.store.unknown_workers(), *(w.id for w in self.store.workers())}
        forget_begun(self.store.path, set(left) - known)

    def beat(self, running: int, now: int, vitals: Vitals = Vitals()) -> bool:
        """Write a heartbeat.  False: we were taken for dead and reaped.

        If somebody has removed the file of locks, lock our byte in the new one.
        But none is made in place of a database that is away.
        """
        is_there = os.path.exists(self.store.path)
        with contextlib.suppress(DatabaseUnavailable):  # then beats have to do
            self._locks = LiveFile.of(self.store.path + "-live", is_there)
        live = self._locks.number if self._locks.hold(self.id) else 0
        alive = self.store.beat(self.id, running, live, now, vitals)
        self._locks.hold_only_here(self.id)
        return alive

    def leave(self, cpu: tuple[float, float] = (0.0, 0.0)) -> None:
        """Take the entry off, and the lock.  `cpu`: used by us, and by children."""
        self.store.remove_worker(self.id, *cpu)
        self.begun.remove()
        self.forsake()

    def forsake(self) -> None:
        """Drop the lock only: the entry is gone, or others shall reap it."""
        self._locks.drop(self.id)
        self.begun.close()

    def mind_the_time(self) -> float:
        """Count this turn; return the monotonic time of its start.

        A stall of ours or a sleep of the machine counts as one second at most.
        """
        at = time.monotonic()
        self._awake += min(1.0, at - self.turn_began)
        self.turn_began = at
        return at

    def doubt(self) -> None:
        """Our own heartbeat failed: others may not have been able to, either.

        So everybody gets a full period again.  Guarded by
        test_a_locked_database_makes_nobody_look_dead.
        """
        self._seen.clear()

    def reap_dead(self, now: int) -> list[LostRun]:
        """Give the runs of dead workers back; return them.

        Looks at so many workers at a time, from where it left off, and reaps so many:
        there may be thousands of rows of the dead, and each reap waits for the disk.
        """
        rows = self.store.workers(self._cursor, _REAP_ROWS)
        self._cursor = rows[-1].id if len(rows) == _REAP_ROWS else 0
        dead = [row for row in rows if row.id != self.id and self._is_dead(row)]
        holding = self.store.running_counts() if dead else {}
        idle = [row for row in dead if row.id not in holding]
        if idle:
            self.store.remove_dead(idle)
            forget_begun(self.store.path, [row.id for row in idle])
        for row in dead:
            self._seen.pop(row.id, None)
        busy: list[tuple] = [(row.id, row.name, row.beat_at) for row in dead
                             if row.id in holding]
        sure = {row.id for row in dead if row.id in holding and self._is_sure(row)}
        busy += [(n, f"#{n}", None) for n in self.store.unknown_workers()]
        return self._reap(busy, sure, now)

    def _reap(self, workers, sure, now):
        lost: list[LostRun] = []
        for n, (worker, name, beat_at) in enumerate(workers):
            if n == _REAP_WORKERS:
                self._cursor = workers[n - 1][0]
                break
            is_over, begun = read_begun(self.store.path, worker)
            if not is_over and worker in sure and self._is_dying(worker):
                continue
            try:
                found = self.store.reap(worker, name, now, beat_at, begun)
            except DatabaseUnavailable:
                if not lost:
                    raise
                break           # say first what is done; the others come again
            self._dying.pop(worker, None)
            if found:           # else it lives, or another has done this
                forget_begun(self.store.path, [worker])
            lost += found
        return lost

    def _is_dying(self, worker):
        """True for a while after its death: its children end now, too.

        A worker that is only silent is not waited for: it may be silent for ever.
        """
        return self._awake - self._dying.setdefault(worker, self._awake) < _LAST_GASP

    @property
    def is_behind(self) -> bool:
        """True when reap_dead() has not looked at all workers yet, or waits for one."""
        return self._cursor > 0 or any(self._is_dying(n) for n in self._dying)

    def _is_sure(self, row):
        return is_surely_dead(row, self._locks, self._machine)

    def _is_dead(self, row):
        """By what the kernel knows; or by its heartbeat, timed by our waking time.

        So a set clock, a laptop's sleep or a stall of ours never looks like the
        death of somebody else.
        """
        if self._is_sure(row):
            return True
        beat_at, seen = self._seen.get(row.id, (None, 0.0))
        if beat_at != row.beat_at:
            self._seen[row.id] = row.beat_at, self._awake
            return False
        return self._awake - seen > self.settings.worker_timeout


# == Wishes ===================================================================
# Owns what people want of the runs that this worker has: that they be cancelled, or
# left alone because their queue is paused.  Asks only when somebody has committed
# since, so that it costs a turn one cheap statement.


class Wishes:
    """What other people do to the runs in a pool."""

    def __init__(self, store: Store, pool: Pool):
        self._store, self._pool = store, pool
        self._heard: tuple = ()         # the version of the data when all was done

    def heed(self, worker: int, at: float) -> list[Run]:
        """Do what is wanted; return runs that have not begun and are to go back.

        A cancellation is asked for until the run has ended: what runs now may be
        hidden behind an answer that has not been read.
        """
        version = self._store.version()
        if version == self._heard:
            return []
        cancels = self._store.cancels_asked(worker)
        for task_id in cancels:
            self._pool.cancel(task_id, at)
        back = []
        if self._pool.in_hand():
            back = self._pool.take_back(self._store.pauses_asked(worker))
        self._heard = () if cancels else version
        return back


# == Log ======================================================================
# Owns the worker's standard output: one JSON object a line, or the same for
# eyes.  Lines are collected and written once a turn.  Never raises and never
# waits: a full disk, a closed pipe or a slow reader must not stop the worker.

# A pipe whose reader sleeps may hold up this many bytes here; then lines are
# dropped and counted, and the count is the first line after.
_LOG_BACKLOG_BYTES = 4 << 20
# What one write puts into a pipe as a whole, or not at all, also where several
# processes write to it.
_PIPE_CHUNK_BYTES = getattr(select, "PIPE_BUF", 512)


# Takes no descriptor of its own, and one system call each time.
_WriteWaiter = getattr(selectors, "PollSelector", selectors.SelectSelector)


def _decimal(value):
    """A number as people, sort(1) and awk(1) read it: 0.000096, not 9.6e-05."""
    text = repr(value)
    if "e-" in text:
        return f"{value:.9f}".rstrip("0").rstrip(".")
    return text if math.isfinite(value) else "null"


# to_json for what most fields are, without the cost of setting it up each time.
_SCALARS = {
    int: int.__repr__, str: json.encoder.encode_basestring_ascii, float: _decimal,
}


def _text_part(fields):
    return "".join([
        f" {key}={_SCALARS.get(type(value), to_json)(value)}"
        for key, value in fields.items() if value is not None
    ])


def _json_part(fields):
    return "".join([
        f',"{key}":{_SCALARS.get(type(value), to_json)(value)}'
        for key, value in fields.items() if value is not None
    ])


def _is_seekable(fd):
    """True for files, where a write does not wait for a reader."""
    try:
        return os.lseek(fd, 0, os.SEEK_CUR) >= 0
    except OSError:
        return False


def _never_waiting(fd, owner):
    """A function that writes to a pipe, socket or terminal, or raises BlockingIOError.

    O_NONBLOCK belongs to the open file, which others share: a shell, its other
    jobs.  So the file is opened again, until `owner` is gone.
    """
    try:
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            is_blocking = os.get_blocking(fd)
            end = own_socket(os.dup(fd))
            os.set_blocking(fd, is_blocking)
            weakref.finalize(owner, end.close)
            return lambda chunk: end.send(chunk, socket.MSG_DONTWAIT)
        path = os.ttyname(fd) if os.isatty(fd) else f"/proc/self/fd/{fd}"
        own = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        weakref.finalize(owner, os.close, own)
        return functools.partial(os.write, own)
    except OSError:             # no /proc, or not ours to open: poll() has to do
        return functools.partial(_write_if_writable, fd)


def _write_if_writable(fd, chunk):
    if not _is_writable(fd, 0):
        raise BlockingIOError
    return os.write(fd, chunk)


def _is_writable(fd, seconds):
    with _WriteWaiter() as waiter:
        waiter.register(fd, selectors.EVENT_WRITE)
        return bool(waiter.select(seconds))


def _first_chunk(unsent):
    """What to write next to a pipe: whole lines, where a line fits into a chunk."""
    if len(unsent) <= _PIPE_CHUNK_BYTES:
        return unsent
    return unsent[: unsent.rfind(b"\n", 0, _PIPE_CHUNK_BYTES) + 1 or _PIPE_CHUNK_BYTES]


class Log:
    """Collects event lines and writes them to the file descriptor `fd`."""

    def __init__(self, fd: int = 1, style: str = "json", clock=now_ms):
        self._fd = fd
        self._is_text = style == "text"
        self._clock = clock
        self._is_file = _is_seekable(fd)
        self._write = functools.partial(os.write, fd) if self._is_file \
            else _never_waiting(fd, self)
        self._at, self._stamp = -1, ""      # of the last line: unix ms, and its text
        self._second, self._until = -1, ""  # the same up to the second
        self._lines: list[str] = []
        self._unsent = bytearray()          # its beginning is cheap to take off

    def event(self, event: str, /, **fields: Any) -> None:
        """Add one line: timestamp, event, then the fields that are not None."""
        self.line(event, self.part(fields))

    def output(self, text: str) -> None:
        """What somebody has printed who runs no task."""
        self.event("output", text=text.rstrip("\n"))

    def part(self, fields: dict) -> str:
        """The text of some fields in a line; may be kept and used again."""
        try:
            return _text_part(fields) if self._is_text else _json_part(fields)
        except Exception as exc:        # a field that cannot be written
            return self.part({"log_error": type(exc).__name__})

    def line(self, event: str, part: str) -> None:
        """Add one line, whose fields part() has made into text."""
        at = self._clock()
        if at != self._at:
            self._at = at
            if at // 1000 != self._second:
                self._second, self._until = at // 1000, iso_time(at)[:-4]
            self._stamp = f"{self._until}{at % 1000:03d}Z"
        if self._is_text:
            self._lines.append(f"{self._stamp} {event:<16}{part}")
        else:
            self._lines.append(
                f'{{"timestamp":"{self._stamp}","event":"{event}"{part}}}'
            )

    def flush(self, patience: float = 0.0) -> None:
        """Write what there is; wait at most `patience` seconds for a slow reader."""
        if self._lines:
            self._lines.append("")
            self._unsent += "\n".join(self._lines).encode("ascii", "backslashreplace")
            self._lines.clear()
        deadline = time.monotonic() + patience
        while self._unsent and self._write_some(deadline):
            pass
        if len(self._unsent) > _LOG_BACKLOG_BYTES:
            self._drop()

    def _write_some(self, deadline):
        """Write a part.  False when no more can be written in time."""
        try:
            chunk = self._unsent if self._is_file else _first_chunk(self._unsent)
            del self._unsent[: self._write(chunk)]
            return True
        except BlockingIOError:
            left = deadline - time.monotonic()
            return left > 0 and _is_writable(self._fd, left)
        except (OSError, ValueError):       # closed, or its disk is full
            self._drop()
            return False

    def _drop(self):
        """Forget what is unsent, but for the line that is half written."""
        half, end, rest = self._unsent.partition(b"\n")
        self._unsent = half + end
        if rest:
            self.event("log_dropped", lines=rest.count(b"\n"))


# == Journal ==================================================================
# Owns the words of the worker's log: which event says what, with which fields.

_MOST_NAMES = 1000          # of tasks, whose text is kept
_MOST_RUNS = 100_000        # … and of runs in flight
_UNHEARD_MS = 10_000        # between two lines that say what listeners do not hear


class Event(NamedTuple):
    """One row of EVENTS, and of the README's table."""

    fields: str         # further ones than those that all events have
    meaning: str


# Each but log_dropped, and output that is no child's, has `worker`; those of a run
# have task_id, name and attempt as well.
EVENTS = {
    "worker_start": Event(
        "pid db concurrency threads coroutines queues durability tasks schedules",
        "a worker starts: what it serves"),
    "database_migrated": Event(
        "before now seconds",
        "the tables were brought up to date; nobody else could write meanwhile"),
    "worker_ready": Event(
        "children start_method",
        "the first child has the app; `start_method`: how they start, and why"),
    "worker_stopping": Event(
        "running patience tasks",
        "the first signal: it waits at most `patience` seconds for these tasks"),
    "worker_stop": Event(
        "handed_back cpu children_cpu error",
        "the worker ends; `error` says why it could not go on"),
    "scheduler_start": Event("schedules", "the number of schedules it serves"),
    "http_start": Event(
        "host port", "`--http` answers there; of port 0 the one that it has got"),
    "cron_fired": Event("schedule name expr task_id tick", "a tick was enqueued"),
    "cron_missed": Event(
        "schedule name expr ticks misfire overlap clock_set_back",
        "ticks were left out: missed, or the run before is unfinished"),
    "late": Event(
        "schedule name expr tick last_success",
        "no run of this schedule has succeeded within its `alert_after` of that tick"),
    "cron_error": Event(
        "schedule expr error", "a schedule's row is unreadable; it starts anew"),
    "clock_leap": Event(
        "seconds in_doubt",
        "the clock was set by over an hour; while in doubt, nothing is deleted"),
    "task_start": Event("", "a run began"),
    "task_success": Event("duration", "the run succeeded"),
    "task_retry": Event(
        "duration kind error retry_at",
        "the run failed; the next one is at `retry_at`"),
    "task_failure": Event(
        "duration kind error traceback", "the run failed, and the task for good"),
    "task_cancelled": Event("duration", "the run was cancelled"),
    "task_timeout": Event(
        "duration timeout stack", "the run reached its time limit; its end follows"),
    "task_crash": Event(
        "duration signal exit_code error stack",
        "the child of the run died; the run's end follows"),
    "task_lost": Event(
        "state reason",
        "a run ended without an outcome: its worker died, another worker took it, its "
        "outcome cannot be stored, or its child ended, perhaps because of another run, "
        "which costs it no retry"),
    "unknown_task": Event(
        "name queue near",
        "a child does not know the task: it is left to workers that do; or, without "
        "`task_id`, such tasks wait and no live worker knows them; `near` is one like "
        "it"),
    "unserved": Event("queue", "tasks wait in a queue that no live worker serves"),
    "queue_paused": Event("queue", "tasks wait in a queue that is paused"),
    "child_error": Event(
        "pid error stack runs",
        "a child had trouble outside of a run, ended with many `runs` in flight, or is "
        "replaced for what a run has left"),
    "loop_lagged": Event(
        "seconds stack",
        "an async task has blocked the event loop of its child, and all others on it, "
        "for a second; said once a minute for each name"),
    "output": Event(
        "text",
        "what a task printed, C code and subprocesses too, these without `task_id` "
        "while tasks share the child; of each run the first 64,000 characters"),
    "rate_limited": Event("name until", "tasks of this name wait for their rate limit"),
    "callback_error": Event(
        "callback error", "an `on_success` or `on_failure` has failed for good"),
    "heartbeat_error": Event("error", "the heartbeat could not be written"),
    "database_error": Event(
        "error", "locked, full or gone; logged once per episode; the worker goes on"),
    "listener_dropped": Event(
        "runs listener error",
        "so many `runs` nobody is told of: a thousand ends wait for who listens with "
        "`on()`; or a listener in the worker has failed and hears no more"),
    "log_dropped": Event("lines", "lost lines: the reader of the log was too slow"),
}


class Journal:
    """Writes the events of one worker."""

    def __init__(self, log: Log, worker: str):
        self.log, self.worker = log, worker
        self._limited: dict[str, int] = {}      # names that wait for their rate
        self._about: dict[Run, str] = {}        # what each line of a run says
        self._names: dict[str, str] = {}        # … and of its name
        # The text that comes before the numbers, and the end.
        self._id, self._attempt = log.part({"task_id": 0, "attempt": 0}).split("0")[:2]
        self._us = log.part({"worker": worker})
        self._listeners: list[Callable[[str, dict], Any]] = []
        self._unheard = self._unheard_at = 0    # ends not told to on(); unix ms said
        self.was_heard = False      # somebody may have enqueued, or cancelled

    def hear(self, listener: Callable[[str, dict], Any]) -> None:
        """Have `listener(event, fields)` called at each event from now on.

        The fields are those of EVENTS that are not None.  The worker waits for it; if
        it raises, that is said, and it is not called again.
        """
        self._listeners.append(listener)

    def say(self, event: str, /, **fields: Any) -> None:
        """An event of the worker itself."""
        self._write(event, {"worker": self.worker, **fields})

    def _write(self, event, fields):
        self.log.line(event, self.log.part(fields))
        if self._listeners:
            self._tell(event, fields)

    def _tell(self, event, fields):
        self.was_heard = True
        for listener in self._listeners[:]:
            if listener not in self._listeners:     # what was said meanwhile broke it
                continue
            try:
                listener(event, {k: v for k, v in fields.items() if v is not None})
            except Exception as exc:
                self._drop(listener, exc)

    def _drop(self, listener, exc):
        with contextlib.suppress(ValueError):       # it was dropped meanwhile
            self._listeners.remove(listener)
        self.say("listener_dropped", listener=text_of(repr, listener),
                 error=text_of(repr, exc))

    def start(self, settings: types.SimpleNamespace, db: str, tasks: dict[str, Entry],
              migrated: tuple | None = None) -> None:
        """What this worker serves, and what it did to old tables; written at once."""
        s = settings
        self.say(
            "worker_start", pid=os.getpid(), db=db, concurrency=s.concurrency,
            threads=s.threads, coroutines=s.coroutines,
            queues=list(s.queues) if s.queues else "all", durability=s.durability,
            tasks=sorted(name for name in tasks if not callback_kind(name)),
            schedules=sum(len(task.schedules) for task in tasks.values()),
        )
        if migrated:
            before, now, seconds = migrated
            self.say("database_migrated", before=before, now=now,
                     seconds=_rounded(seconds))
        self.log.flush()

    def stopping(self, running: list, patience: float) -> None:
        """A signal has come: what is waited for, and how long.  A second ends it."""
        self.say(
            "worker_stopping", running=len(running), patience=patience,
            tasks=[f"{run.id} {run.name}" for run in running],
        )

    def run(self, event: str, run: Run | None, /, **fields: Any) -> None:
        """An event of a run; None: of no run in particular."""
        if run is None:
            self.say(event, **fields)
            return
        about = self._about.get(run)
        if about is not None and event == "task_start":     # in another child, before
            return
        if about is None:
            if len(self._about) >= _MOST_RUNS:
                self._about.clear()
            name = self._names.get(run.name) or self._name_part(run.name)
            about = self._about[run] = \
                f"{self._id}{run.id}{name}{self._attempt}{run.attempt}{self._us}"
        self.log.line(event, about + self.log.part(fields) if fields else about)
        if self._listeners:
            self._tell(event, {**self._fields_of(run), **fields})

    def _name_part(self, name):
        if len(self._names) >= _MOST_NAMES:
            self._names.clear()
        return self._names.setdefault(name, self.log.part({"name": name}))

    def _fields_of(self, run):
        return {"task_id": run.id, "name": run.name, "attempt": run.attempt,
                "worker": self.worker}

    def death(self, end: Ended) -> None:
        """What a crash or a time limit left behind; its outcome comes after."""
        error, about = end.error or {}, {"duration": _rounded(end.duration)}
        stack = error.get("traceback") or None
        if end.kind == "crash":
            self.run("task_crash", end.run, **about, signal=error["signal"],
                     exit_code=error["exit_code"], error=error["message"], stack=stack)
        elif end.kind == "timeout":
            self.run("task_timeout", end.run, **about, timeout=end.run.timeout,
                     stack=stack)

    def outcome(self, outcome: Outcome) -> None:
        """How a run ended; said after the commit, so it is true."""
        run, duration = outcome.run, _rounded(outcome.duration)
        if outcome.state == SUCCESS:
            self.run("task_success", run, duration=duration)
        elif outcome.state == CANCELLED:
            self.run("task_cancelled", run, duration=duration)
        else:
            self._failed(outcome, duration)
        self._about.pop(run, None)

    def _failed(self, outcome, duration):
        run, error = outcome.run, outcome.error or {}
        about = {"kind": error["kind"], "error": str(TaskError(error))}
        if outcome.state == RETRYING:
            retry_at = iso_time(outcome.run_at or 0)
            return self.run("task_retry", run, duration=duration, **about,
                            retry_at=retry_at)
        self.run("task_failure", run, duration=duration, **about,
                 traceback=error.get("traceback"))
        kind = callback_kind(run.name)
        if kind:
            self.run("callback_error", run, callback=kind, error=about["error"])

    def limited(self, limited: dict, now: int) -> None:
        """Names that begin to wait for their rate, each until a time.

        Nothing is said of those that wait for the end of a run, at no known time.
        """
        for name, until in limited.items():
            if until == math.inf:
                continue
            if self._limited.get(name, 0) <= now:
                self.say("rate_limited", name=name, until=iso_time(until))
            self._limited[name] = until

    def unheard(self, runs: int, now: int) -> None:
        """Ends that no listener is told of: said at once, then once in 10 s."""
        self._unheard += runs
        if self._unheard and abs(now - self._unheard_at) >= _UNHEARD_MS:
            self.say("listener_dropped", runs=self._unheard)
            self._unheard, self._unheard_at = 0, now

    def lost(self, lost: LostRun) -> None:
        """A run whose worker died."""
        about, state = {"task_id": lost.id, "name": lost.name}, state_name(lost.state)
        self._write("task_lost", {**about, "attempt": lost.attempt,
                                  "worker": lost.worker, "state": state})
        if lost.state != FAILED:
            return
        error, kind = {"error": "lost: its worker died"}, callback_kind(lost.name)
        self._write("task_failure", {**about, "attempt": lost.attempt, "kind": "lost",
                                     **error})
        if kind:
            self._write("callback_error", {**about, "callback": kind, **error})


def _rounded(seconds):
    return None if seconds is None else round(seconds, 6)


# == Upkeep ===================================================================
# Owns what is done for the database from time to time: old finished tasks are
# deleted, history is added up, and what a wrong clock has written is put right.
#
# A wall clock that leapt forward looks like a machine that was off, but a wrong one
# is mostly put right soon.  So a leap of more than an hour since any worker's last
# look is not believed at once, but after a 24th of its length, an hour at least and
# a day at most; until then nothing is deleted.  Cron ticks and delays do not wait for
# that: a leap costs them nothing, see Scheduler and Store.shorten_waits().

_CLOCK_KEEP_MS = 60_000     # between two writes of the time last seen
_PRUNE_BATCH = 1000         # rows looked at by one pass
_SHORTEN_BATCH = 500        # waits put right by one transaction


def look_at_clock(view: ClockView | None, now: int) -> ClockView:
    """What to believe after a look at the clock; in doubt, `doubted` is set.

    A second look that comes after more than twice the leap is another leap.
    """
    if view is None or now <= view.seen + HOUR_MS:
        return ClockView(now, None)
    seen, doubted = view
    if doubted is None or not -HOUR_MS <= now - doubted <= 2 * (doubted - seen):
        return ClockView(seen, now)
    is_settled = now - doubted >= min(DAY_MS, max(HOUR_MS, (doubted - seen) // 24))
    return ClockView(now, None) if is_settled else view


def finished_before(keep: float, now: int) -> int | None:
    """The end of what is kept for `keep` seconds; None: it is kept for ever."""
    return None if keep == math.inf else now - to_ms(keep)


class Upkeep:
    """Of one worker's database.  `log` takes an event and fields."""

    def __init__(self, store: Store, settings: types.SimpleNamespace, log: Callable):
        self.store, self.settings, self._log = store, settings, log
        self.is_in_doubt = False        # about the clock: nothing is deleted
        self._offset: float | None = None       # ms of wall clock ahead of monotonic
        self._kept = -math.inf          # monotonic: when the clock was last looked up
        self._wrong_waits = False       # some may be too long, and are looked for
        self._cursor = 0

    def mind_clock(self, now: int, at: float) -> bool:
        """Notice a leap of the wall clock against the monotonic `at`, also one since
        the last worker.  True: tasks may be due, or limits open, earlier than said."""
        offset = now - at * 1000
        leap = 0.0 if self._offset is None else offset - self._offset
        went_back = leap < -LATE_TURN_MS
        if went_back or leap > HOUR_MS \
                or (at - self._kept) * 1000 >= _CLOCK_KEEP_MS:
            self._look(now, went_back)
            self._kept = at
        self._offset = offset
        if not self._wrong_waits:
            return False
        count = self.store.shorten_waits(now, _SHORTEN_BATCH)
        self._wrong_waits = count == _SHORTEN_BATCH
        return True

    def _look(self, now, went_back):
        old = self.store.clock()
        new = look_at_clock(old, now)
        self.is_in_doubt = new.doubted is not None
        ahead = max(old.seen, old.doubted or 0) - now if old else 0     # it was
        is_back = ahead > HOUR_MS
        self._wrong_waits |= went_back or ahead > LATE_TURN_MS
        if old is None or old.doubted != new.doubted \
                or abs(new.seen - old.seen) >= _CLOCK_KEEP_MS:
            self.store.put_clock(new)
        if is_back or self.is_in_doubt and new != old:
            leap = -ahead if is_back else now - new.seen
            self._log("clock_leap", seconds=leap / 1000, in_doubt=self.is_in_doubt)

    def prune(self, now: int) -> bool:
        """Delete a batch of old finished tasks; True: look for more soon."""
        if self.is_in_doubt:
            return False
        s = self.settings
        _, self._cursor = self.store.prune(
            self._cursor, finished_before(s.retention, now),
            finished_before(s.retention_failed, now), _PRUNE_BATCH,
        )
        return self._cursor > 0

    def roll_up(self, now: int) -> bool:
        """Add up a part of history that is over; True: look for more soon."""
        return not self.is_in_doubt and self.store.roll_up(now)


# == Tally ====================================================================
# Owns when the runs that ended are written into history: in the transaction that
# writes their ends, if the last time was a tenth of a second ago or more; else they
# are kept for the next, or for one of their own, so that thousands of ends a second
# cost ten rows of each task.  Who is killed has lost what was kept, and no more.

_TALLY_SECONDS = 0.1        # between two additions to history


class Tally:
    """Runs of which the end is in the database, and not yet in history."""

    def __init__(self):
        self._kept = RunCounts()
        self._due = 0.0             # monotonic: not to be written before
        self._quarter = 0           # of an hour: in each so many groups are told apart

    @property
    def next_due(self) -> float:
        """When it is worth a transaction; infinite: nothing is kept."""
        return self._due if self._kept else math.inf

    def to_write(self, outcomes: Sequence[Outcome], at: float) -> RunCounts | None:
        """What goes into history together with these; None: nothing does, now."""
        if at < self._due or not (outcomes or self._kept):
            return None
        return self._kept

    def wrote(self, outcomes: Sequence[Outcome], history: RunCounts | None, now: int,
              at: float) -> None:
        """These ends were committed, with what to_write() said."""
        if history is None:
            self._kept.add(outcomes)
            return
        quarter = now // 1000 // QUARTER
        is_new = self._quarter not in (0, quarter)
        self._kept = RunCounts(None if is_new else self._kept.known)
        self._quarter, self._due = quarter, at + _TALLY_SECONDS


# == Settling =================================================================
# Owns what follows a run: settle() decides it, and the Outbox keeps it until it is
# in the database, also through hours in which that cannot be written.

_GATHER_SECONDS = 0.005     # that an outcome may wait for others to share its commit


def settle(ended: Ended, policy: RetryPolicy, now: int, chance: float,
           worker: str = "") -> Outcome:
    """Decide what follows a run: the one place where that is decided.

    success → success · cancelled → cancelled · abort → failed · anything else is
    retried while it may be and retries are left, and fails after that.
    """
    run, error = ended.run, ended.error
    started_at = ended.started_at
    if started_at is None and ended.duration is not None:   # its child is dead
        started_at = now - to_ms(ended.duration)
    outcome = Outcome(
        run, SUCCESS, ended.result, error and _kept_error(error), ended.output,
        started_at, ended.duration,
    )
    if error is None and ended.kind == "success":
        return _followed(outcome, now, worker) if run.callbacks else outcome
    outcome = outcome._replace(state=FAILED)
    if ended.kind == "cancelled":
        return outcome._replace(state=CANCELLED)
    if not (error and error.get("retryable")) or run.is_last:
        final = {**(outcome.error or {}), "final": _why_final(error or {})}
        outcome = outcome._replace(error=final if error else None)
        return _followed(outcome, now, worker)
    delay = error.get("countdown")
    if delay is None:
        delay = retry_delay(policy, run.used, chance)
    run_at = min(now + to_ms(max(0.0, delay)), LATEST_MS)
    # The delay is counted from the end of the run by this very clock, so that
    # shorten_waits() knows it when the clock was set during the run.
    began = now - to_ms(ended.duration or 0.0)
    outcome = outcome._replace(
        state=RETRYING, run_at=run_at, started_at=max(0, began))
    return _followed(outcome, now, worker)


def _why_final(error):
    """Why no run follows this one: what raised it, or that it was the last."""
    if error.get("kind") == "abort":
        return "abort"
    if error.get("retryable"):
        return "used_up"
    return "retry_for" if error.get("retry_for") is not None else "refused"


def fail_refused(refused: OutcomeRefused, now: int, worker: str) -> Outcome | None:
    """The outcome to write instead of one that cannot be stored: a failure.

    None when this is what was refused: then there is nothing to be written.
    """
    run, before = refused.outcome.run, refused.outcome.error or {}
    kind = type(refused).__name__
    if before.get("type") == kind:
        return None
    error = {"kind": "exception", "type": kind, "message": str(refused),
             "final": "refused"}
    return _followed(Outcome(run, FAILED, error=error), now, worker)


def _followed(outcome, now, worker):
    """The outcome with the callbacks and listeners that are to be told of it."""
    rows = callback_rows(outcome.run, outcome.state, outcome.error, now, worker)
    return outcome._replace(then=rows)


def _kept_error(error):
    """The parts of an error that are stored with the task."""
    parts = ("kind", "type", "message", "traceback", "signal", "exit_code", "peak",
             "cpu", "retry_for")
    return {part: error[part] for part in parts if error.get(part) not in (None, "")}


class Outbox:
    """What became of runs and is not in the database yet; kept until it is."""

    def __init__(self, store: Store, journal: Journal, tasks: dict,
                 begun: Begun | None = None):
        self._store, self._journal = store, journal
        self._begun = begun or Begun()
        self._tasks = tasks                     # by name
        self.progress: dict[int, tuple[Run, str]] = {}      # by id, to be written
        self.outcomes: list[Outcome] = []       # to be written
        self.returned: list[Run] = []           # claimed, not begun, to be queued
        self.forgiven: list[Run] = []           # begun, to be queued uncounted
        self.tally = Tally()
        self.due = 0.0                          # monotonic; 0: nothing waits for more
        self.handed_back = 0                    # runs that were queued again

    @property
    def is_full(self) -> bool:
        """True when something must not be lost in a power cut."""
        return bool(self.outcomes or self.returned or self.forgiven)

    @property
    def makes_work(self) -> bool:
        """True when there may be something to claim once it is written."""
        return bool(self.returned or self.forgiven) or any(
            outcome.then or outcome.run.is_counted for outcome in self.outcomes)

    def gathers(self, slack: float, at: float) -> bool:
        """True while what has ended waits for more of its kind to share its commit.

        Only as long as every child has something to do, which is for `slack` seconds:
        nobody waits for us then, nor for what is handed back.
        """
        if self.returned or self.forgiven or not self.outcomes:
            return False
        self.due = self.due or at + _GATHER_SECONDS
        return at < self.due and slack >= _GATHER_SECONDS

    def clear(self) -> None:
        """It is written, or does not matter any more."""
        self.outcomes, self.returned, self.forgiven, self.due = [], [], [], 0.0
        self.progress.clear()

    def settle(self, ended: Sequence[Ended], now: int) -> None:
        """Turn what the pool says into outcomes to be written."""
        for end in ended:
            if end.kind == "unknown":       # after a deploy the child's code is newer
                self.returned.append(end.run)
                self._journal.run("unknown_task", end.run)
                continue
            task = self._tasks.get(end.run.name)
            policy = task.policy if task else RetryPolicy()
            self.outcomes.append(
                settle(end, policy, now, random.random(), self._journal.worker))
            if end.error is not None:
                self._journal.death(end)

    def turn(self, worker: int, now: int, patience: float,
             order: ClaimOrder | None = None, stopped: Sequence[Run] = (),
             at: float = math.inf) -> Turned:
        """Write all there is, and claim by `order`, in one step: all or nothing.

        But one outcome that cannot be stored must not hold up the others for ever:
        that run fails, and the rest is written.  By default it is the last turn, and
        what is due in history at any time is written, too.
        """
        stopped = [*self.forgiven, *stopped]
        history = self.tally.to_write(self.outcomes, at)
        while True:
            try:
                turned = self._store.turn(Turn(
                    worker, self.outcomes, self.returned, stopped,
                    tuple(self.progress.values()), order, history,
                ), now, patience)
                break
            except OutcomeRefused as exc:
                self._replace(exc, now)
        self.tally.wrote(turned.written, history, now, at)
        self._begun.take(outcome.run for outcome in self.outcomes)
        self._begun.take(itertools.chain(self.returned, stopped))
        self.handed_back += len(self.returned) + len(stopped)
        for outcome in turned.stale:
            self._journal.run("task_lost", outcome.run, reason="it was given away")
        for outcome in turned.written:
            self._journal.outcome(outcome)
        self._journal.unheard(turned.unheard, now)
        self.clear()
        return turned

    def _replace(self, refused, now):
        """Have the run fail; if not even that can be written, leave it to be reaped."""
        runs = [outcome.run for outcome in self.outcomes]
        place = runs.index(refused.outcome.run)
        instead = fail_refused(refused, now, self._journal.worker)
        self.outcomes[place : place + 1] = [instead] if instead else []
        if instead is None:
            self._journal.run("task_lost", refused.outcome.run, reason=str(refused))


# == Lookout ==================================================================
# Owns when a worker looks for work, and how far it has looked.  Knows nothing of
# children but how much room they have.

BUSY_PATIENCE = 0.25        # seconds a worker's turn waits for the write lock


class Lookout:
    """Whether a look for work is worth it, how far the last got, when the next is due.

    A look only reads; a claim takes the write lock, and is made when a look has
    found something, or when there is something to be written as well.
    """

    def __init__(self, store: Store, settings: types.SimpleNamespace, tasks: dict,
                 kinds: Kinds = Kinds()):
        self._store, self._tasks = store, tasks
        self._queues = settings.queues and frozenset(settings.queues)
        self._rates = {n: t.rate_limit for n, t in tasks.items() if t.rate_limit}
        self._callbacks = {n: t.callbacks for n, t in tasks.items() if t.callbacks}
        self._most_running = {
            n: t.max_running for n, t in tasks.items() if t.max_running}
        self._is_async = kinds.is_async
        if settings.rate_limit:
            self._rates[""] = settings.rate_limit
        self.news = True                # something may be there to claim
        self.next_at: int | None = None     # when a task is due
        self.round = Round()            # how far it was looked for
        self._room = Room()             # of the pool, as the last turn has left it
        self._passed_over: set[str] = set()     # names that children do not know
        self._version: tuple = ()       # of the data, at the last look

    def order(self, worker: int, room: Room, unknown: set[str],
              short_names: set[str], proves_begun: bool = False) -> ClaimOrder | None:
        """What could be claimed now; None without room.

        More room than a turn ago is worth a look: the last one may have found what
        needs a free child.  Whatever made the room.
        """
        self.news |= any(n > before for n, before in zip(room, self._room))
        self._room = room
        if not any(room[:3]):       # a child to itself needs one of these, too
            return None
        if self._passed_over != unknown:
            self._passed_over, self.news = set(unknown), True
        names: Any = self._tasks
        if self._passed_over:
            names = names.keys() - self._passed_over
        return ClaimOrder(
            worker, self._queues, names, room.free, room.ahead, short_names,
            self._rates, self._callbacks, room.beside, self._is_async, room.alone,
            self._most_running, proves_begun)

    def look(self, order: ClaimOrder, now: int) -> tuple[bool, Claimed | None]:
        """(a claim is worth the lock, what was seen); None: no need to look."""
        version = self._store.data_version()
        self.news |= version != self._version or (self.next_at or now + 1) <= now
        if not self.news and self.round.is_over:
            return False, None
        self._version = version
        return self._store.peek(self.begin(order), now)

    def begin(self, order: ClaimOrder) -> ClaimOrder:
        """The order with where its round stands; what is new begins another."""
        if self.news:
            self.news, self.round = False, self.round.renewed()
        return ClaimOrder(*order[:-1], self.round)

    def learn(self, seen: Claimed) -> None:
        """Keep what a look saw beside the runs it found."""
        self.next_at, self.round = seen.next_at, seen.round

    def took(self, runs: Sequence[Run]) -> None:
        """These were claimed: then perhaps there is more."""
        asyncs = sum(run.name in self._is_async for run in runs)
        self._room, self.news = self._room.less(len(runs) - asyncs, asyncs), True

    @property
    def has_room(self) -> bool:
        """True when a run could be taken, had there been one."""
        return any(self._room[:3])

    def seconds(self, now: int) -> float:
        """Seconds until a look is worth it; infinite when only news can tell."""
        if self.news or not self.round.is_over:
            return 0.0
        return math.inf if self.next_at is None else (self.next_at - now) / 1000

    def is_done(self, now: int) -> bool:
        """True when nothing is due, nor waits for a limit."""
        return self.seconds(now) > 0 and not self.round.limited


# == Senses ===================================================================
# Owns a worker's sleep and what ends it: something from a child, a datagram from
# whoever has committed, a signal, the clock.  Says what was heard, and decides nothing.


def stop_signals():
    """What ends a worker.  A hangup does not where it was ignored: nohup."""
    hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    stops = [signal.SIGTERM, signal.SIGINT]
    return stops if hangup else [*stops, signal.SIGHUP]


@contextlib.contextmanager
def _handling(numbers, handler):
    """Within this block these signals come to `handler`, however we were started.

    Whoever starts a worker may have blocked or ignored what it needs, and its children
    inherit that.  Ignored from here on: the stop of a background process that
    writes to its terminal.
    """
    needed = {*numbers, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2}
    changes = {signal.SIGTTOU: signal.SIG_IGN, **dict.fromkeys(numbers, handler)}
    before = {number: set_signal(number, to) for number, to in changes.items()}
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, needed)
    try:
        yield
    finally:
        for number, old in before.items():
            set_signal(number, old or signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def quitting_at_once(last: Callable = nobody) -> contextlib.AbstractContextManager:
    """A block in which a stop signal ends this process, with status 0 and one line.

    For as long as there is nothing that wants an orderly end; `last` is called first.
    """
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()

    def stop(*_):
        last()
        _quit()

    return _handling(stop_signals(), stop)


def _quit(*_):
    with contextlib.suppress(OSError):
        os.write(2, b"pybgworker: stopped before it began\n")
    os._exit(0)


class StopSignals:
    """Counts what asks for a stop; SIGCHLD only ends the loop's sleep.

    The handler does no more than that: the loop does the rest.
    """

    def __init__(self):
        self.count = 0
        self.begun = False          # there is something to be stopped in good order
        self.receiver: Any = None   # readable after a signal

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Within this block, in the main thread, signals come here."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.receiver, sender = socket_pair()
        for end in (self.receiver, sender):
            end.setblocking(False)
        wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            with _handling([*stop_signals(), signal.SIGCHLD], self._handle):
                yield
        finally:
            signal.set_wakeup_fd(wakeup)
            self.receiver.close()
            sender.close()

    def _handle(self, number, _frame):
        if number == signal.SIGHUP:         # it may come twice: from the shell too
            self.count = max(1, self.count)
        elif number != signal.SIGCHLD:
            self.count += 1
        if self.count and not self.begun:
            _quit()

    def drain(self) -> None:
        """Take in what woke the loop."""
        with contextlib.suppress(OSError):
            while self.receiver.recv(4096):
                pass


class Heard(NamedTuple):
    """What has ended a sleep."""

    children: Sequence[tuple] = ()      # (child, descriptor) with something to read
    news: bool = False                  # somebody says that they have committed
    signal: bool = False                # one has come, or a word of the nursery


class Senses:
    """What a worker listens to."""

    def __init__(self):
        self.selector = OwnSelector()       # children register with themselves
        self.ear = WakeSocket()
        self.stops = StopSignals()
        if self.ear.socket:
            self.selector.register(self.ear.socket, selectors.EVENT_READ, "ear")

    def begin(self) -> None:
        """From now on there is something to be stopped in good order."""
        self.stops.begun = True
        if self.stops.receiver:
            self.selector.register(self.stops.receiver, selectors.EVENT_READ, "signal")

    def hear(self, seconds: float) -> Heard:
        """Sleep until there is something, or so many seconds have passed."""
        children, news, is_signal = [], False, False
        for key, _ in self.selector.select(seconds):
            if key.data == "ear":
                news = self.ear.drain()
            elif key.data == "signal":
                self.stops.drain()
                is_signal = True
            elif key.data == "nursery":
                is_signal = True
            else:
                children.append((key.data, key.fd))
        return Heard(children, news, is_signal)

    def close(self) -> None:
        """Listen to nothing any more."""
        self.ear.close()
        self.selector.close()


# == Signs ====================================================================
# Owns what a worker tells the database of itself while it works: how far it is, what
# troubles it, what it and its children use.

_NOTE_CHARS = 300
_NOTED_SECONDS = 1.0            # that a run lasts before anything is told of it
_MOST_NOTED = 1000              # runs of one worker of which something is told


class Signs:
    """What is to be told of one worker and its pool."""

    def __init__(self, store: Store, pool: Pool):
        self._store, self._pool = store, pool
        self.state = "starting"         # or ready, or stopping
        self.note: str | None = None    # its trouble, in words that follow its name
        self._episode = 0.0             # monotonic: that of the trouble told …
        self._since = ""                # … and when that was, for people
        self._children_cpu = 0.0        # the most so far: a death may hide some
        self._noted: dict[Run, RunRow] = {}     # what the database has of runs

    def look(self, reason: str, since: float, at: float) -> bool:
        """Look for trouble; True if it is another than before.

        `reason` is that of the database, `since` a monotonic time; empty: none.
        """
        before, self.note = self.note, self._trouble(reason, since, at)
        return before != self.note

    def _trouble(self, reason, since, at):
        if reason:
            if since != self._episode:
                self._episode = since
                began = self._store.now() - to_ms(at - since)
                self._since = f"{iso_time(began)[11:19]} UTC"
            short = reason.partition(f"{self._store.path}: ")[2]
            text = f"cannot write since {self._since}: {short or reason}"
        elif self._pool.crew.starts.trouble:
            text = f"cannot start children: {self._pool.crew.starts.trouble}"
        else:
            return None
        return text[:_NOTE_CHARS]

    def vitals(self) -> Vitals:
        """What the next heartbeat says."""
        own = usage_of(os.getpid())
        cpu, ended = cpu_seconds()
        children = [child for child in map(_child_row, self._pool.members) if child]
        nursery = self._pool.crew.nursery.process
        used = nursery and usage_of(nursery.pid)
        children_cpu = ended + sum(c.cpu for c in children) + (used.cpu if used else 0)
        self._children_cpu = max(self._children_cpu, round(children_cpu, 3))
        return Vitals(self.state, self.note, own and own.memory, cpu,
                      self._children_cpu, children)


    def note_runs(self, worker: int, now: int, at: float) -> None:
        """Tell of the runs that last, and of what they have printed since."""
        found = dict(itertools.islice(self._lasting(now, at), _MOST_NOTED))
        rows: dict[Run, RunRow] = {}
        printed = []
        for run, (row, slot) in found.items():
            old = self._noted.get(run)
            if old is None or (old.pid, old.behind) != (row.pid, row.behind):
                old = row._replace(worker=worker)
            rows[run] = old         # else when it began is measured only once
            if slot and slot.kept and slot.kept.told < slot.kept.size:
                printed.append((slot.kept, PrintedRun(
                    run, slot.kept.untold(), slot.kept.size)))
        new = [row for run, row in rows.items() if row is not self._noted.get(run)]
        gone = self._returned(rows)
        if new or gone or printed:
            for run in rows:
                run.is_noted = True     # before: whether it was written or not
            self._store.note_runs(worker, new, gone, [run for _, run in printed], now)
            for kept, (_, _, size) in printed:
                kept.told = size
        self._noted = rows

    def _lasting(self, now, at):
        """(run, (row, its slot)) of those that have run for a second, and of what
        waits behind one of them."""
        for member in self._pool.members:
            head = None
            for slot in member.slots():
                age = at - slot.began
                if slot.run is not None and age >= _NOTED_SECONDS:
                    began = now - to_ms(age)
                    yield slot.run, (self._row(member, slot.run, began, None), slot)
                    head = slot.run if slot is member.slot else head
                elif slot is not member.slot:
                    break           # those after it are younger
            if head is not None:
                for run in itertools.islice(member.waiting, 1, None):
                    yield run, (self._row(member, run, None, head.id), None)

    def _row(self, member, run, began_at, behind):
        return RunRow(run.id, 0, run.attempt, member.process.pid, began_at, behind)

    def _returned(self, rows):
        """(id, attempt) of those of which no more is to be told, but are still here.

        The rows of what has ended, or was given back, went with that.
        """
        missing = [run for run in self._noted if run not in rows]
        if not missing:
            return []
        here = {*self._pool.hand.runs,
                *(run for member in self._pool.members for run in member.runs())}
        return [(run.id, run.attempt) for run in missing if run in here]


def _child_row(member):
    """None for one that is not born yet, or is dead."""
    pid = member.process.pid
    used = None if member.process.exit or not pid else usage_of(pid)
    if used is None and (IS_LINUX or not pid or member.process.exit):
        return None
    running = sum(slot.run is not None for slot in member.slots())
    return ChildRow(0, pid, running, *(used or (0, 0.0)))


# == Unserved =================================================================
# Owns what is said when work waits that nobody takes: its queue is paused, or served
# by no live worker, or none of those that serve it knows the task.

_MOST_WAITING = 1000        # (queue, name) that one look is about


def live_workers(store: Store, now: int, timeout: float) -> list[WorkerRow]:
    """Those that have beaten in so many seconds, unless the kernel knows better."""
    is_dead = judge_of(store)
    return [row for row in store.workers()
            if now - row.beat_at <= timeout * 1000 and not is_dead(row)]


def _serves(row, queue):
    queues = None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        queues = json.loads(row.queues or "null")
    return not isinstance(queues, list) or queue in queues


def why_nobody(queue: str, name: str, live: Sequence[WorkerRow],
               known: Sequence[KnownTask], paused: Container[str]) -> tuple:
    """(event, its fields) for such a task, which waits; empty: somebody takes it.

    Nothing is known against a worker of an older version: it has not said what it
    knows.
    """
    if queue in paused:
        return "queue_paused", {"queue": queue}
    serving = {row.id for row in live if _serves(row, queue)}
    if not serving:
        return "unserved", {"queue": queue}
    knowing = {task.worker for task in known if task.name == name}
    if knowing & serving or serving - {task.worker for task in known}:
        return ()
    import difflib

    names = {task.name for task in known if not callback_kind(task.name)}
    near = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.6)
    return "unknown_task", {"name": name, "queue": queue, "near": near[0] if near else
                            None}


class Unserved:
    """What one worker has said of it: once for each cause, while that lasts."""

    def __init__(self, store: Store, settings: types.SimpleNamespace, say: Callable,
                 tasks: Container[str]):
        self._store, self._settings, self._say = store, settings, say
        self._tasks = tasks             # names that this worker knows
        self._version: tuple | None = None      # of the data, at the last look
        self._said: set[tuple] = set()

    def look(self, now: int) -> None:
        """Say what is new.  Not at the first look: others may be starting as well."""
        before, self._version = self._version, self._store.version()
        if before is None or before == self._version:
            return
        said, self._said = self._said, set()
        for event, fields in self._causes(now):
            cause = event, *fields.values()
            if cause not in said | self._said:
                self._say(event, **fields)
            self._said.add(cause)

    def _causes(self, now):
        """Asks for others only if there is something that we do not take."""
        waiting = self._store.waiting_names(_MOST_WAITING)
        paused = set(self._store.paused_queues()) if waiting else set()
        queues = self._settings.queues
        strange = [
            (queue, name) for queue, name in waiting
            if queue in paused or queues and queue not in queues
            or name not in self._tasks]
        if not strange:
            return []
        live = live_workers(self._store, now, self._settings.worker_timeout)
        known = self._store.known_tasks()
        found = (why_nobody(*of, live, known, paused) for of in strange)
        return [cause for cause in found if cause]


# == Household ================================================================
# Owns a worker's chores: its sign of life, the dead, the clock, what is old, the
# children's state, and those of rooms.  What the database refuses comes again, and
# is said once: see Trouble.

ERROR_PAUSE = 0.1           # seconds between two tries on a database in trouble
_BUSY_SILENCE = 5.0         # … of "locked" before it is worth a log line
_PRUNE_SECONDS = 60.0       # between two rounds of passes
_UNSERVED_SECONDS = 3.0     # between two looks for what nobody takes
_REAP_SECONDS = 0.5         # between two looks for dead workers
_REAP_PAUSE = 0.05          # … while there are more than one look is about


class Chore:
    """Something to be done every so many seconds of the worker's own time."""

    def __init__(self, seconds: float, act: Callable[[int], float | None],
                 is_punctual: bool = False, close: Callable[[], Any] = nobody):
        self.seconds = seconds
        self.act = act              # returns when it is due again, if not in `seconds`
        self.is_punctual = is_punctual      # worth waking for
        self.close = close          # called when the worker ends
        self.due = 0.0

    def act_now(self, now: int, at: float) -> None:
        """Do it.  `at` is monotonic: setting the clock neither hurries nor stops it.

        One that fails is due again at once, not a period later.
        """
        self.due = at + ERROR_PAUSE
        wait = self.act(now)
        self.due = at + (self.seconds if wait is None else wait)


# Chores of rooms: each is called with the worker that starts, and returns a Chore.
CHORES: list[Callable[[Worker], Chore]] = []


def chore(make: Callable[[Worker], Chore]) -> Callable[[Worker], Chore]:
    """Decorate a function that is to be one of CHORES."""
    CHORES.append(make)
    return make


class Trouble:
    """Which of a worker's dealings with the database fail now.

    An episode is as long as anything that failed has not worked again.  Each event
    is said once in it; a lock is worth no line before _BUSY_SILENCE.
    """

    def __init__(self, say: Callable):
        self._say = say
        self.since = 0.0            # monotonic; of the episode
        self.reason = ""            # what the database says, once that is worth a line
        self._said: set[str] = set()
        self.failing: set = set()   # the acts, as they were called
        self.fatal = ""             # what no later turn can mend

    def survives(self, at: float, act: Callable, *args: Any) -> bool:
        """Call `act`; True if the database let it.

        An act that returns False has not asked it: that is no sign of recovery.
        """
        try:
            if act(*args) is not False:
                self.failing.discard(act)
        except DatabaseUnavailable as exc:
            self.since = self.since if self.failing else at
            self.failing.add(act)
            if not isinstance(exc, DatabaseBusy) or at - self.since >= _BUSY_SILENCE:
                self.say_once("database_error", exc)
                self.reason = str(exc)
            if exc.fatal:
                self.fatal = str(exc)
            return False
        if not self.failing:
            self._said.clear()
            self.reason = ""
        return True

    def do_chores(self, chores: list[Chore], now: int, at: float) -> None:
        """Do those that are due, up to the first that fails: it has waited enough.

        That one goes to the end, so that it keeps no other from its turn.
        """
        for chore in [chore for chore in chores if at >= chore.due]:
            if not self.survives(at, chore.act_now, now, at):
                chores.remove(chore)
                chores.append(chore)
                break

    def say_once(self, event: str, exc: Exception) -> None:
        """A log line, unless this episode has had it."""
        if event not in self._said:
            self._said.add(event)
            self._say(event, error=str(exc))


class Household:
    """The chores of one worker.  `start_over` is called when it was taken for dead."""

    def __init__(self, store: Store, settings: types.SimpleNamespace, journal: Journal,
                 lookout: Lookout, liveness: Liveness, pool: Pool,
                 start_over: Callable[[int], Any], tasks: Container[str] = ()):
        self._store, self._journal, self._lookout = store, journal, lookout
        self._liveness, self._pool, self._start_over = liveness, pool, start_over
        self.upkeep = Upkeep(store, settings, journal.say)
        self.signs = Signs(store, pool)
        self.unserved = Unserved(store, settings, journal.say, tasks)
        self.trouble = Trouble(journal.say)
        self._children = settings.concurrency
        self.is_ready = False           # a child has imported the app
        self._heart = Chore(settings.heartbeat_interval, self._beat)
        self.chores = [
            self._heart,
            Chore(_REAP_SECONDS, self._reap),
            Chore(1.0, self._look_after_children),
            Chore(1.0, self._note_runs),
            Chore(_UNSERVED_SECONDS, self._say_unserved),
            Chore(1.0, lambda now: store.housekeep()),
            Chore(0.0, self.mind_clock),        # a turn may last as long as the leap
            Chore(_PRUNE_SECONDS, self._prune),
        ]

    def note_readiness(self) -> None:
        """Say that the first child has the app; or give up, when none ever will."""
        crew = self._pool.crew
        if crew.starts.given_up and not crew.is_ready():
            reason = f"its children cannot start:\n{crew.starts.given_up}"
            self.trouble.fatal = self.trouble.fatal or reason
        if not self.is_ready and crew.is_ready():
            self.is_ready = True
            self.become("ready")
            self._journal.say("worker_ready", children=self._children,
                              start_method=crew.nursery.start_method)

    def become(self, state: str) -> None:
        """Say at once that the worker is ready, or is stopping, which it stays."""
        if self.signs.state != "stopping":
            self.signs.state, self._heart.due = state, 0.0

    def keep(self, now: int, at: float) -> None:
        """Do what is due."""
        self.trouble.do_chores(self.chores, now, at)

    def close(self) -> None:
        """The worker ends, and has said so."""
        for chore in self.chores:
            chore.close()
        self._journal.log.flush(patience=2.0)

    def next_due(self) -> float:
        """When there is something that is worth waking for."""
        punctual = [chore.due for chore in self.chores if chore.is_punctual]
        return min(punctual, default=math.inf)

    def mind_clock(self, _: int | None = None) -> None:
        """Look whether the clock was set.

        Not by the time of the turn: that may have waited long for a lock since then.
        """
        news = self.upkeep.mind_clock(self._store.now(), time.monotonic())
        self._lookout.news |= news

    def _beat(self, now):
        try:
            alive = self._liveness.beat(
                len(self._pool.running()), now, self.signs.vitals())
        except DatabaseUnavailable as exc:
            self.trouble.say_once("heartbeat_error", exc)
            self._liveness.doubt()
            raise
        if not alive:
            self._start_over(now)
        return None if alive else 0.0

    def _reap(self, now):
        for lost in self._liveness.reap_dead(now):
            self._lookout.news = True
            if lost.begun:
                self._journal.lost(lost)
        return _REAP_PAUSE if self._liveness.is_behind else None

    def _look_after_children(self, now):
        at, pool = time.monotonic(), self._pool
        pool.crew.oom_kills.look()
        pool.crew.fill(at)
        pool.notice_deaths(at)
        pool.check_memory(at)
        pool.crew.starts.mention_slow(pool.members, at)
        if self.signs.look(self.trouble.reason, self.trouble.since, at):
            self._heart.due = 0.0

    def _say_unserved(self, now):
        if self.signs.state == "ready":
            self.unserved.look(now)

    def _note_runs(self, now):
        self.signs.note_runs(self._liveness.id, now, time.monotonic())

    def _prune(self, now):
        """Delete what is old, add up history; by a clock that is looked at first."""
        self.mind_clock()
        is_more = self.upkeep.prune(now)
        return 0.1 if self.upkeep.roll_up(now) or is_more else None


# == Worker ===================================================================
# Owns the loop.  Each turn is step(now): hear the children, decide what is worth
# the write lock, write what ended and claim in one transaction, hand out, keep
# house.  One thread, one writer; nothing in it waits long.  A database that is
# locked, full or gone means: keep the outcomes, claim nothing, say so once, try again.

_POLL_SECONDS = 0.1         # between two looks, when no wake-up arrives
_DEAF_POLL_SECONDS = 0.02   # … where there is no wake-up socket
_HEED_SECONDS = 0.25        # between two looks for what people want of our runs
_STOP_PATIENCE = 2.0        # seconds that its last turn waits for the write lock


class Health(NamedTuple):
    """How a worker does, for those who watch it from outside or from a thread."""

    turned_at: float            # monotonic: the begin of the last turn of its loop
    trouble: str                # why it is not ready for tasks; empty: it is


def health_of(worker: Worker) -> Health:
    """How it does just now.  May be called from another thread."""
    trouble = worker.house.trouble
    if worker.senses.stops.count:
        why = "it is stopping"
    elif not worker.pool.crew.is_ready():
        why = "no child is ready"
    elif trouble.failing:
        why = trouble.reason or "the database is busy"
    else:
        why = ""
    return Health(worker.liveness.turn_began, why)


class Worker:
    """Serves one database with a pool of children.

    With `burst` it ends when nothing is due or running.
    """

    def __init__(self, registry: Registry, settings: types.SimpleNamespace,
                 store: Store, burst: bool = False, log: Log | None = None,
                 nursery: Nursery | None = None):
        ensure_descriptors(settings.concurrency)
        self.registry, self.settings, self.burst = registry, settings, burst
        self.store, store.follow = store, False     # a replaced file ends this worker
        self.journal = Journal(log or Log(), self.settings.worker_name)
        self.senses = Senses()
        self.liveness = Liveness(self.store, self.settings, self.senses.ear,
                                 registry.tasks)
        begun, kinds = self.liveness.begun, kinds_of(settings, registry.tasks)
        self.pool = Pool(nursery or Nursery(registry.app_spec), settings.concurrency,
                         settings, self.journal.run, self.senses.selector, begun, kinds)
        self.pool.crew.nursery.serve(store.path, settings, bool(kinds.is_async),
                                     self.journal.run, self.senses.selector)
        self.outbox = Outbox(self.store, self.journal, registry.tasks, begun)
        self.lookout = Lookout(self.store, self.settings, registry.tasks, kinds)
        self.house = Household(self.store, self.settings, self.journal, self.lookout,
                               self.liveness, self.pool, self._start_over,
                               registry.tasks)
        self.wishes = Wishes(self.store, self.pool)
        self.heeding = Chore(_HEED_SECONDS, self._heed_wishes)
        self.stop_by = 0.0              # monotonic: the end of a graceful stop

    # -- life

    def run(self) -> int:
        """Work until a signal, or in burst mode until done; return exit status.

        0 after an orderly end, 1 when it cannot go on; standard error says why.
        """
        with self.senses.stops.caught():
            self.start()
            try:
                while not self._is_done():
                    heard = self.wait()
                    self.step(self.store.now(), heard)
            except BaseException as exc:
                self._break_off(exc)
                raise
            self.stop()
        fatal = self.house.trouble.fatal
        if fatal:
            print(f"pybgworker: {fatal}", file=sys.stderr)
        return 1 if fatal else 0

    def start(self) -> None:
        """Register, say what is served, start the children."""
        migrated = self.store.create()
        self.liveness.register(self.store.now(), self.pool.crew.nursery.start_method)
        with contextlib.suppress(DatabaseBusy):     # the first turn looks again
            self.house.mind_clock()
        self.journal.start(self.settings, self.store.path, self.registry.tasks,
                           migrated)
        self.house.chores += [self.heeding, *(make(self) for make in CHORES)]
        self.senses.begin()
        self.pool.crew.fill(time.monotonic())

    @property
    def is_ready(self) -> bool:
        """True once a child has imported the app."""
        return self.house.is_ready

    def _is_done(self):
        stops = self.senses.stops.count
        if self.house.trouble.fatal or stops > 1:
            return True
        idle = not (self.outbox.is_full or self.pool.in_hand())
        if stops:
            return idle or 0 < self.stop_by <= time.monotonic()
        if not self.burst or not idle or not self.is_ready:
            return False
        return self.lookout.is_done(self.store.now())

    def stop(self) -> None:
        """Hand back what runs, end the children, and leave the database."""
        now = self.store.now()
        self.pool.crew.starts.end()
        if not self.senses.stops.count:
            self.outbox.handed_back = 0
        self.outbox.returned += self.pool.recall_all()
        busy = self.pool.in_hand()
        interrupted = self.pool.interrupt(time.monotonic()) if busy else []
        self._settle(now)
        self.pool.crew.stop()
        try:
            self.outbox.turn(self.liveness.id, now, _STOP_PATIENCE, stopped=interrupted)
            self.liveness.leave(cpu_seconds())
        except DatabaseUnavailable as exc:      # the others will reap us
            self.journal.say("database_error", error=str(exc))
            self.liveness.forsake()
        own, childrens = cpu_seconds()
        self.journal.say("worker_stop", handed_back=self.outbox.handed_back, cpu=own,
                         children_cpu=childrens,
                         error=self.house.trouble.fatal or None)
        self._close()

    def _break_off(self, exc):
        """End as if killed: who reaps us charges what was running.

        What no code expected may have come of one of the runs.  Handed back it would
        be forgiven, and come again for ever.  Guarded by
        test_a_run_that_breaks_its_worker_is_charged_and_fails_in_the_end.
        """
        self.pool.interrupt(time.monotonic())
        self.pool.crew.stop()
        self.liveness.begun.remove()        # it may be one that had not begun
        self.liveness.forsake()
        self.journal.say("worker_stop", error=f"{type(exc).__name__}: {exc}")
        self._close()

    def _close(self):
        self.house.close()
        self.senses.close()

    def _start_over(self, now):
        """We were taken for dead: our runs are somebody else's now.

        Guarded by test_a_worker_that_was_given_up_kills_its_runs.
        """
        self.pool.recall_all()
        at = time.monotonic()
        for run in self.pool.interrupt(at, idle=True):  # they mark the old cells
            self.journal.run("task_lost", run, reason="this worker was given up")
        self.pool.collect()
        self.outbox.clear()
        self.liveness.forsake()
        self.liveness.register(now)
        self.lookout.news = True
        self.pool.crew.fill(at)

    # -- one turn

    def wait(self) -> Heard:
        """Sleep until a child, a caller, a signal or the clock wants something."""
        return self.senses.hear(self._patience())

    def _patience(self):
        """Seconds to sleep at most."""
        if self._transact in self.house.trouble.failing:
            return ERROR_PAUSE
        if self.outbox.returned:        # others may have time for them
            return 0.0
        at = time.monotonic()
        if self.outbox.due:
            return max(0.0, self.outbox.due - at)
        longest = _POLL_SECONDS if self.senses.ear.port else _DEAF_POLL_SECONDS
        # What no child could take is not due: the end of a run wakes us.  Guarded
        # by test_a_turn_that_can_do_nothing_is_not_due.
        if self.lookout.has_room and not self.senses.stops.count:
            longest = min(longest, self.lookout.seconds(self.store.now()))
        due = min(self.house.next_due(), self.pool.next_timer(),
                  self.outbox.tally.next_due, self.stop_by or math.inf)
        return max(0.0, min(longest, due - at))

    def step(self, now: int, heard: Heard = Heard()) -> None:
        """One turn.  Raises nothing that a database in trouble can cause."""
        at = self.liveness.mind_the_time()
        self._hear(heard, now, at)
        places = self.pool.balance(at)
        if not self.house.trouble.survives(at, self._transact, places, now, at):
            self.lookout.news = True    # what it saw, it may not have claimed
        self.outbox.returned += self.pool.dispatch(places, at)
        self.house.keep(now, at)
        # What is committed in this thread shows in no version of the data.
        self.lookout.news |= self.journal.was_heard
        self.journal.was_heard = False
        self.journal.log.flush()

    def _hear(self, heard, now, at):
        """Take in what the children say, and what has come to an end by itself."""
        if heard.news:
            self.lookout.news, self.heeding.due = True, 0.0     # or a cancellation
        if heard.signal:
            self.pool.crew.attend(at)
            self.pool.notice_deaths(at)
        self.pool.receive(heard.children, at)
        self.pool.enforce(at)
        self.house.note_readiness()
        if self.senses.stops.count and not self.stop_by:
            self.stop_by = at + self.settings.shutdown_timeout
            self.house.become("stopping")
            self.outbox.handed_back = 0         # from now on it is for the stop
            self.pool.crew.starts.end()
            self.outbox.returned += self.pool.recall_all()
            self.journal.stopping(self.pool.running(), self.settings.shutdown_timeout)
        self._settle(now)

    def _settle(self, now):
        ended, forgiven, progress = self.pool.collect()
        self.outbox.settle(ended, now)
        self.outbox.forgiven += forgiven
        self.outbox.progress.update(progress)

    def _transact(self, places, now, at):
        """Decide what is worth the write lock; write what ended and claim by it."""
        is_stopping, box = self.senses.stops.count > 0, self.outbox
        if not is_stopping and box.gathers(places.slack, at):
            return False
        order = None if is_stopping else self._order(places)
        if not (box.is_full or box.progress or False
                or self._wants(order, now)):
            return None
        self.lookout.news |= box.makes_work
        turned = box.turn(self.liveness.id, now, BUSY_PATIENCE,
                          order and self.lookout.begin(order), at=at)
        if turned.claimed:
            self._take_in(turned.claimed, now)
        return None

    def _order(self, places):
        """What could be claimed now; None without room."""
        pool, unknown = self.pool, self.pool.crew.unknown
        return self.lookout.order(
            self.liveness.id, pool.room(places), unknown,
            pool.durations.short_names, self.liveness.begun.is_kept,
        )

    def _wants(self, order, now):
        """True when it is worth taking the write lock just to claim."""
        found, seen = self.lookout.look(order, now) if order else (False, None)
        if seen and not found:
            self._learn(seen, now)
        return found

    def _learn(self, seen, now):
        self.lookout.learn(seen)
        if seen.waits is not None:
            self.outbox.returned += self.pool.make_way(seen.waits)
        self.journal.limited(seen.round.limited, now)

    def _take_in(self, claimed, now):
        if not claimed.is_registered:
            return self._start_over(now)
        self._learn(claimed, now)
        for run in claimed.runs:
            if run.timeout is None:
                run.timeout = self.settings.timeout
        if claimed.runs:
            self.pool.take(claimed.runs)
            self.lookout.took(claimed.runs)

    def _heed_wishes(self, now):
        self.outbox.returned += self.wishes.heed(self.liveness.id, time.monotonic())


# == Command line =============================================================
# Owns `python pybgworker.py`: the table of commands, `run`, and main(argv), which
# returns the exit status: 0 done, 1 it could not be done (one line on standard
# error says why), 2 wrong usage.

# What a terminal would obey and not show: controls (C0, DEL, C1), marks that turn
# the direction of text, and halves of surrogate pairs.
_UNSHOWN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The same text with what a terminal would obey written out: \\x1b."""
    return _UNSHOWN.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


class Command(NamedTuple):
    """One row of COMMANDS."""

    name: str
    act: Callable           # (args, app) -> text to print, exit status, or None
    help: str
    example: str
    flags: tuple
    reads: bool = False     # takes --json


def flag(*names: str, **options: Any) -> tuple:
    """One argument, by what argparse's add_argument() takes."""
    return names, options


COMMANDS: list[Command] = []


def command(name: str, help: str, example: str, *flags: tuple,
            reads: bool = False) -> Callable:
    """Decorate a function (args, app) that is to be a command.

    It returns the text to be printed, an exit status, or None.
    """
    def add(act):
        COMMANDS.append(Command(name, act, help, example, flags, reads))
        return act

    return add


def typed(parse: Callable) -> Callable:
    """A parser of settings as argparse wants one: its error says what is allowed."""
    def parse_flag(text):
        import argparse

        try:
            return parse(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {exc}") from None

    return parse_flag


def is_terminal(stream: Any) -> bool:
    """True where somebody may look."""
    return stream is not None and stream.isatty()


JSON_FLAG = flag("--json", action="store_true", help="one JSON document")


def _setting_flag(setting):
    return flag("--" + setting.name.replace("_", "-"), type=typed(setting.parse),
                default=None, metavar="X", help=setting.meaning.replace("%", "%%"))


@contextlib.contextmanager
def _log_apart(style):
    """Yield the Log on standard output; within the block nothing else gets there.

    What is printed in this process, by who hears its events, becomes `output` events;
    what C code writes to descriptor 1 goes to standard error.
    """
    log_fd, original = os.dup(1), sys.stdout
    log = Log(log_fd, style)
    sys.stdout = TaskStream(lambda text, *_: log.output(text), 1)   # type: ignore
    os.dup2(2, 1)
    try:
        yield log
    finally:
        log.flush(patience=1.0)
        if original is not None:
            original.flush()            # what was written to sys.__stdout__
        sys.stdout = original
        os.dup2(log_fd, 1)
        os.close(log_fd)


@command("run", "work on tasks until told to stop",
         "run --app tasks --concurrency 4",
         flag("--app", required=True, metavar="MODULE[:APP]",
              help="the module that defines the tasks"),
         flag("--burst", action="store_true",
              help="end when nothing is due or running"),
         flag("--log-format", choices=("json", "text"),
              help="json: an object a line; text: human-readable (default: text on "
              "a terminal)"),
         *(_setting_flag(s) for s in SETTINGS if s.flag and s.name != "db"))
def _run(args, app):
    check_platform()
    flags = {s.name: getattr(args, s.name) for s in SETTINGS if s.flag}
    style = args.log_format or ("text" if is_terminal(sys.stdout) else "json")
    with _log_apart(style) as log:
        name = args.worker_name or os.environ.get("PYBGWORKER_WORKER_NAME")
        journal = Journal(log, name or default_worker_name())
        nursery = Nursery(args.app, journal.run)
        try:
            with quitting_at_once(nursery.kill):
                nursery.start(time.monotonic())
                registry = nursery.await_app(log.flush)
            settings = registry.settings(flags)
            worker = Worker(registry, settings, open_store(settings), args.burst, log,
                            nursery)
        except BaseException:
            nursery.stop(EXIT_GRACE)
            raise
        return worker.run()


def _arguments(argv):
    """The arguments; the parsers of other commands than theirs are not made."""
    import argparse

    argv = sys.argv[1:] if argv is None else list(argv)
    for command in COMMANDS:
        if argv[:1] == [command.name]:
            one = argparse.ArgumentParser(
                prog=f"pybgworker {command.name}", **_described(command))
            _add_flags(one, command)
            return one.parse_args(argv[1:], argparse.Namespace(command=command.name))
    return _parser().parse_args(argv)


def _described(command):
    return {"description": command.help + ".",
            "epilog": f"example: python pybgworker.py {command.example}"}


def _add_flags(parser, command):
    for names, options in command.flags + ((JSON_FLAG,) if command.reads else ()):
        parser.add_argument(*names, **options)
    parser.add_argument("--db", type=typed(parse_path), metavar="PATH", default=None,
                        help="the SQLite file (default: PYBGWORKER_DB, else "
                        "pybgworker.db)")


def _parser():
    """The parser of what names no command, or one that there is not."""
    import argparse

    examples = "\n".join(f"  python pybgworker.py {c.example}" for c in COMMANDS)
    parser = argparse.ArgumentParser(
        prog="pybgworker", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Background tasks for Python programs, kept in one SQLite file.",
        epilog=f"examples:\n{examples}",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        _add_flags(commands.add_parser(
            command.name, help=command.help, **_described(command)), command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 or 2; 130 after Ctrl-C.

    Without `argv` this is the program: it ends soon after its main thread, with this
    status, although a thread that the app has started would keep it for ever.
    """
    status = 1
    try:
        status = _command(argv)
        return status
    finally:
        if argv is None and is_held():
            end_soon(status)


def _command(argv):
    try:
        _fill_standard_descriptors()
        args = _arguments(argv)
        printed = _carry_out(args)
        if isinstance(printed, str):
            print_text(printed)
        return printed if isinstance(printed, int) else 0
    except OtherCopy as other:
        return sys.modules[other.name].main(argv)
    except BrokenPipeError:                 # … | head: nobody reads any more
        _silence_output()
        return 0
    except (PyBgWorkerError, ValueError) as exc:
        print(f"pybgworker: {visible(str(exc))}", file=sys.stderr)
        return 2 if isinstance(exc, UsageError) else 1
    except OSError as exc:                  # a full disk, or a file of somebody else
        _silence_output()
        print(f"pybgworker: {visible(str(exc))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _fill_standard_descriptors():
    """A closed descriptor 0, 1 or 2 would be taken by the next file to be opened."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)      # gets the lowest number: this one


def print_text(text):
    """Print in whatever encoding standard output has; what it lacks is written out."""
    if sys.stdout is None:
        raise Problem("standard output is closed")
    encoding = sys.stdout.encoding or "ascii"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def _silence_output():
    """Nothing more can be printed; not even at the interpreter's exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _carry_out(args):
    command = next(c for c in COMMANDS if c.name == args.command)
    app = default_app
    try:
        os.getcwd()
    except FileNotFoundError:
        raise Problem("the current folder was deleted: cd to another") from None
    app.override(db=args.db)
    return command.act(args, app)


###############################################################################
# ROOMS
# Each stands alone on what is above, by public names; without them the core runs.
###############################################################################

# == Cron =====================================================================
# Owns cron expressions: what they mean, and when they are due.  Pure: no clock.
# The grammar and the day rule are those of Debian's cron, and so is its rule for
# daylight saving time (man 8 cron): a job whose minute or hour begins with * follows
# the wall clock, also twice through a repeated hour; any other runs once a day,
# and right after a gap that swallowed its time.
#
# A *wall minute* is a count of minutes since 1970-01-01 00:00 on the wall clock.

_DAY_MINUTES = 1440
_DAY_1970 = date(1970, 1, 1).toordinal()
_HOUR = 3600                    # seconds
_LARGEST_SHIFT = 3 * _HOUR      # of a clock change that jobs are adjusted for
_NEAR = 26 * _HOUR              # a window that holds one change of the offset at most
_LONGEST_EXPRESSION = 1000      # characters
_LONGEST_NUMBER = 9             # digits


class CronError(PyBgWorkerError, ValueError):
    """An expression or zone that cannot be used.

    `.expr` is all of it, `.field` where (minute, hour, day-of-month, month,
    day-of-week, fields, macro, tz), `.token` the offending part.
    """

    def __init__(self, expr: str, field: str, token: str, text: str):
        self.expr, self.field, self.token = expr, field, token
        super().__init__(f"bad cron {expr!r}: {field}: {text}")


class _Field(NamedTuple):
    name: str
    low: int
    high: int
    names: tuple = ()


_FIELDS = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day-of-month", 1, 31),
    _Field("month", 1, 12, (
        "jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov",
        "dec",
    )),
    _Field("day-of-week", 0, 7, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
_MACROS = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
# What people bring along from other crons, and what to write instead.
_HINTS = (
    (r"\?", "use * instead of ?"),
    (r"l|.*l$|lw", "L, the last day, is not supported"),
    (r".*#.*", "# (the n-th weekday) is not supported"),
    (r"\d*w", "W (the nearest weekday) is not supported"),
    (r"h(\(.*\))?(/.*)?|r|.*~.*", "random times are not supported; see jitter="),
)
_LONGEST_MONTH = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


class _WallTimes:
    """The wall minutes that match the five fields of an expression."""

    def __init__(self, expr: str):
        parts = _split(expr)
        sets = [_parse_field(expr, f, part) for f, part in zip(_FIELDS, parts)]
        self.minutes, self.hours, self.days, self.months = sets[:4]
        self.weekdays = {day % 7 for day in sets[4]}        # 0 is Sunday
        self.is_either = not (parts[2].startswith("*") or parts[4].startswith("*"))
        self.is_wildcard = parts[0].startswith("*") or parts[1].startswith("*")
        minutes = sorted(self.minutes)
        self._times = [60 * h + m for h in sorted(self.hours) for m in minutes]

    @property
    def is_empty(self) -> bool:
        """True when no date matches, as in `0 0 30 2 *`.

        Decided, not searched for: every date falls on every weekday some year.
        """
        return not self.is_either and all(
            day > _LONGEST_MONTH[month - 1] for month in self.months
            for day in self.days
        )

    def first_from(self, wall: int) -> int:
        """The first at or after a wall minute.  ValueError beyond the year 9999."""
        day, minute = divmod(wall, _DAY_MINUTES)
        here = bisect.bisect_left(self._times, minute)
        if here == len(self._times) or not self._has(day):
            day, here = day + 1, 0
            while not self._has(day):
                day += 1
        return day * _DAY_MINUTES + self._times[here]

    def last_until(self, wall: int) -> int:
        """The last at or before a wall minute.  ValueError before the year 1."""
        day, minute = divmod(wall, _DAY_MINUTES)
        here = bisect.bisect_right(self._times, minute) - 1
        if here < 0 or not self._has(day):
            day, here = day - 1, -1
            while not self._has(day):
                day -= 1
        return day * _DAY_MINUTES + self._times[here]

    def _has(self, day):
        found = date.fromordinal(_DAY_1970 + day)
        if found.month not in self.months:
            return False
        in_month = found.day in self.days
        in_week = found.isoweekday() % 7 in self.weekdays
        return in_month or in_week if self.is_either else in_month and in_week


class Cron:
    """A cron expression in a time zone: `Cron("30 2 * * mon-fri", "Europe/Paris")`.

    Five fields (minute, hour, day-of-month, month, day-of-week) of `*`, values,
    names, ranges and steps, or @hourly, @daily and so on.  If neither day field
    begins with `*`, a day that matches either of them matches.  Raises CronError.
    """

    def __init__(self, expr: str, tz: str = "UTC"):
        if not isinstance(expr, str):
            raise OptionError(f"a cron expression is a str, not {type(expr).__name__}")
        self.expr, self.tz = expr, tz
        self._wall = _WallTimes(expr)
        self._zone = _zone(expr, tz)
        self.never = self._wall.is_empty    # True when no date matches

    def __repr__(self) -> str:
        return f"Cron({self.expr!r}, {self.tz!r})"

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Cron) and self.expr == other.expr
        return same and self.tz == other.tz     # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash((self.expr, self.tz))

    def next(self, after: datetime) -> datetime | None:
        """The first tick strictly after an aware datetime; None for never."""
        return self._moment(self.tick_after(_seconds_of(after)))

    def prev(self, before: datetime) -> datetime | None:
        """The last tick strictly before an aware datetime; None for never."""
        return self._moment(self.tick_before(_seconds_of(before)))

    def _moment(self, tick):
        return None if tick is None else datetime.fromtimestamp(tick, self._zone)

    def tick_after(self, after: float) -> int | None:
        """next() in unix seconds."""
        walk = self._wildcard_after if self._wall.is_wildcard else self._fixed_after
        return self._tick(walk, math.floor(after))

    def tick_before(self, before: float) -> int | None:
        """prev() in unix seconds."""
        walk = self._wildcard_before if self._wall.is_wildcard else self._fixed_before
        return self._tick(walk, math.ceil(before))

    def _tick(self, walk, instant):
        if self.never:
            return None
        try:
            return walk(instant)
        except (OverflowError, ValueError, OSError):    # outside of years 1 to 9999
            return None

    def place(self, tick: int) -> int:
        """What a tick is known by, and rises from tick to tick.

        For a fixed time the seconds of the wall clock, so that it stays the same
        tick when new zone data moves it; for any other its unix seconds.
        """
        return tick if self._wall.is_wildcard else tick + self._offset(tick)

    def tick_beyond(self, place: int) -> int | None:
        """The first tick whose place is above this one, in unix seconds."""
        start = place if self._wall.is_wildcard else self._instant(place // 60)
        tick = self.tick_after(place - self._offset(place) if start is None else start)
        while tick is not None and self.place(tick) <= place:
            tick = self.tick_after(tick)
        return tick

    # -- instants

    def _offset(self, instant):
        """Seconds that the wall clock is ahead of UTC."""
        if self._zone is timezone.utc:
            return 0
        moment = datetime.fromtimestamp(instant, self._zone)
        return (moment.utcoffset() or timedelta(0)) // timedelta(seconds=1)

    def _wildcard_after(self, after):
        """Follow the wall clock, from one change of the offset to the next."""
        start = after + 1
        while True:
            offset = self._offset(start)
            wall = self._wall.first_from(-(-(start + offset) // 60))
            tick = wall * 60 - offset
            change = self._change(start, min(tick, start + _NEAR))
            if change is not None and change <= tick:
                start = change          # the new offset holds from there on
            elif tick - start > _NEAR + 4 * _HOUR:
                start = tick - _NEAR    # nothing is due before: look closely there
            else:
                return tick

    def _wildcard_before(self, before):
        start = before - 1
        while True:
            offset = self._offset(start)
            wall = self._wall.last_until((start + offset) // 60)
            tick = wall * 60 - offset
            change = self._change(max(tick, start - _NEAR), start)
            if change is not None and tick < change:
                start = change - 1
            elif start - tick > _NEAR + 4 * _HOUR:
                start = tick + _NEAR
            else:
                return tick

    def _change(self, low, high):
        """The instant in (low, high] from which the offset of `high` holds, or None.

        The two are so near that there is one change between them at most.
        """
        new = self._offset(high)
        if self._offset(low) == new:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            if self._offset(middle) == new:
                high = middle
            else:
                low = middle
        return high

    def _fixed_after(self, after):
        """Map each wall time to its first instant; one in a gap to the gap's end."""
        wall = (after + self._offset(after)) // 60
        while True:
            wall = self._wall.first_from(wall)
            tick = self._instant(wall)
            if tick is not None and tick > after:
                return tick
            wall += 1

    def _fixed_before(self, before):
        # In a repeated hour the wall clock has been further already.
        earlier = before - _LARGEST_SHIFT
        wall = (before + max(self._offset(before), self._offset(earlier))) // 60
        while True:
            wall = self._wall.last_until(wall)
            tick = self._instant(wall)
            if tick is not None and tick < before:
                return tick
            wall -= 1

    def _instant(self, wall):
        """The first instant at which the wall clock shows this minute.

        For one that it leaps over, the end of the leap; None for a leap over hours,
        which is a correction and not daylight saving time.
        """
        for late in range(_LARGEST_SHIFT // 60 + 1):
            shown = datetime(1970, 1, 1) + timedelta(minutes=wall + late)
            ahead = shown.replace(tzinfo=self._zone).utcoffset()
            offset = (ahead or timedelta(0)) // timedelta(seconds=1)
            instant = (wall + late) * 60 - offset
            if self._offset(instant) == offset:
                return instant
        return None


def _seconds_of(moment):
    """Unix time of an aware datetime, by way of UTC: a zone may repeat an hour."""
    if not isinstance(moment, datetime) or moment.tzinfo is None:
        raise OptionError(f"{moment!r} must be a datetime with a time zone")
    since = moment.astimezone(timezone.utc) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return since.days * 86400 + since.seconds + since.microseconds / 1e6


def _zone(expr, tz):
    if tz == "UTC":
        return timezone.utc             # ZoneInfo("UTC") needs zone data
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(tz)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        raise CronError(
            expr, "tz", str(tz),
            f"{tz!r} is not a zone that this machine knows (an IANA name like "
            "Europe/Paris; if all are unknown: install the package tzdata)",
        ) from None


def _split(expr):
    """The five fields of an expression."""
    if len(expr) > _LONGEST_EXPRESSION:
        raise CronError(expr[:40] + "…", "fields", "", "longer than 1,000 characters")
    text = expr.strip(" \t")
    if text.startswith("@"):
        return _expand_macro(expr, text).split(" ")
    parts = re.split("[ \t]+", text) if text else []
    if len(parts) != 5:
        hint = "; seconds and years are not supported" if len(parts) in (6, 7) else ""
        raise CronError(
            expr, "fields", text, f"5 fields expected, {len(parts)} found{hint}"
        )
    return parts


def _expand_macro(expr, text):
    if text.lower() in _MACROS:
        return _MACROS[text.lower()]
    hint = f"{text!r} is not one of {', '.join(sorted(_MACROS))}"
    if text.lower() == "@reboot":
        hint = "@reboot is not supported: call .delay() when your program starts"
    raise CronError(expr, "macro", text, hint)


def _parse_field(expr, field, text):
    """The set of values that a field's text names."""
    found: set[int] = set()
    for item in text.split(","):
        try:
            found.update(_parse_item(field, item))
        except ValueError as exc:
            token, hint = exc.args
            raise CronError(expr, field.name, token, hint) from None
    return found


def _parse_item(field, item):
    """`*`, `a`, `a-b`, each with `/step`.  Raises ValueError(token, what is wrong)."""
    shape = re.fullmatch(r"(\*|\w+)(?:-(\w+))?(?:/(\w+))?", item, re.ASCII)
    if not shape or (shape[1] == "*" and shape[2]):
        raise ValueError(item, _why_not(field, item))
    first, last, step = shape.groups()
    low = field.low if first == "*" else _value(field, first)
    if first == "*":
        high = field.high
    elif last is not None:
        high = _last_value(field, last, low)
    else:
        high = low if step is None else max(low, 6 if field.high == 7 else field.high)
    if low > high:
        top = 6 if field.high == 7 else field.high
        fix = f"{low}-{top},{field.low}-{high}"
        raise ValueError(item, f"{item!r} runs backwards: use {fix}")
    return range(low, high + 1, 1 if step is None else _step(step))


def _value(field, token):
    if token.lower() in field.names:
        return field.low + field.names.index(token.lower())
    if not token.isdigit():
        raise ValueError(token, _why_not(field, token))
    if len(token) > _LONGEST_NUMBER or not field.low <= int(token) <= field.high:
        raise ValueError(token, f"{token!r} is not in {field.low}-{field.high}")
    return int(token)


def _last_value(field, token, low):
    """The end of a range: in fri-sun, Sunday is 7."""
    if field.high == 7 and token.lower() == "sun" and low > 0:
        return 7
    return _value(field, token)


def _step(token):
    if not token.isdigit() or len(token) > _LONGEST_NUMBER or int(token) == 0:
        raise ValueError(token, f"step {token!r} is not a whole number from 1 up")
    return int(token)


def _why_not(field, token):
    """What is wrong with a token that is no value, with a hint where there is one."""
    for pattern, hint in _HINTS:
        if re.fullmatch(pattern, token.lower()):
            return f"{token!r}: {hint}"
    for number, name in enumerate(field.names, field.low):
        if token.lower().startswith(name) and token.isalpha():
            return f"{token!r} is not a name: use {name} or {number}"
    if not token:
        return "an item is missing at a comma"
    names = f" or {field.names[0]}-{field.names[-1]}" if field.names else ""
    return f"{token!r} is not in {field.low}-{field.high}{names}"


# == Scheduler ================================================================
# Owns what happens at a cron tick.  Every worker does it; the database lets one of
# them move a schedule's row on, in the transaction that enqueues the runs, so each
# tick is enqueued once.
#
# A schedule is what it says: task, expression and zone, wherever it stands in the
# program.  A worker fires those that its own program has, as that one has them; so
# an old and a new version side by side share what they agree on and each serve the
# rest, and neither undoes what the other wrote.
#
# The clock may leap and come back, so what a row remembers is no single last tick.
# It is the ranges of ticks dealt with: a normal day extends the last range, and a
# leap forward that drops ticks (a downtime, or a wrong clock: who knows) begins
# another one.  No tick inside a range is enqueued, so nothing runs twice.  The range
# at or below now is the one that goes on, so a clock that was a year ahead for a
# moment leaves one tick of next year behind and silences nothing; and after a clock
# that was behind, even in 1970, the range of before goes on where it was.

_CRON_POLL = 30.0           # seconds; the clock may be set at any time
_LATE_LOOK_SECONDS = 30.0   # between two looks for schedules that are late
_LATE_MS = 30 * DAY_MS      # for so long it is known that a late tick was said
_CRON_BATCH = 50            # schedules moved on by one transaction …
_CRON_BATCH_TICKS = 1000    # … as long as they have fewer ticks than this


class TickPlan(NamedTuple):
    """What to do about a schedule now."""

    ticks: list[int]        # to be enqueued, oldest first; unix seconds
    next_tick: int | None   # to wait for
    missed: int             # ticks dropped, counted up to the cap
    done: list              # the ranges of ticks dealt with, from now on


_MISFIRE_GRACE = 30         # seconds late that a tick may be and not count as missed
_MISFIRE_CAP = 1000         # ticks that are caught up with, or counted, at most
_OLDEST = 1_600_000_000     # unix seconds; a clock that shows less is wrong
_DONE_RANGES = 8            # kept; of more, those nearest to each other are joined


def plan_ticks(cron: Cron, done: list, now: float, misfire: str = "latest") -> TickPlan:
    """Decide which ticks of a schedule to enqueue at unix time `now`.

    `done` is what was dealt with before: ranges [first, last] of Cron.place(), in
    order; empty for a new schedule, whose first tick is after now.
    """
    latest = cron.tick_before(math.floor(now) + 1)
    if latest is None:                                  # before the year 1
        return TickPlan([], cron.tick_after(now), 0, done)
    end = cron.place(latest)
    here = bisect.bisect_right(done, [end, math.inf])
    before, after = done[:here], done[here:]
    ticks, missed = [], 0
    if not before or before[-1][1] < _OLDEST <= end:
        # New; or the clock is behind all we know; or it was, and no downtime.
        before.append([end, end])
    elif before[-1][1] < end:
        ticks, missed = _choose_ticks(cron, latest, before[-1][1], now, misfire)
        first = cron.place(ticks[0]) if ticks else end
        # What was dropped is left as a gap: the clock may have leapt.
        before.append([first if missed else before.pop()[0], end])
    next_tick = _next_undone(cron, before[-1][1], after)
    return TickPlan(ticks, next_tick, missed, _joined(before + after))


def _choose_ticks(cron, latest, last_done, now, misfire):
    """The ticks to run, oldest first, from `latest` back to the last one done; and
    how many others there are."""
    most = {"latest": 1, "skip": _MISFIRE_CAP, "all": _MISFIRE_CAP}[misfire]
    ticks: list[int] = []
    missed, tick = 0, latest
    while tick is not None and cron.place(tick) > last_done and missed < _MISFIRE_CAP:
        is_late = misfire == "skip" and now - tick >= _MISFIRE_GRACE
        if is_late or len(ticks) == most:
            missed += 1
        else:
            ticks.append(tick)
        tick = cron.tick_before(tick)
    return ticks[::-1], missed


def _joined(ranges):
    """The ranges, or few enough of them to be kept."""
    while len(ranges) > _DONE_RANGES:
        gaps = [right[0] - left[1] for left, right in zip(ranges, ranges[1:])]
        at = gaps.index(min(gaps))
        ranges[at:at + 2] = [[ranges[at][0], ranges[at + 1][1]]]
    return ranges


def _next_undone(cron, place, ranges):
    """The first tick beyond a place that is in none of these ranges."""
    tick = cron.tick_beyond(place)
    for first, last in ranges:
        if tick is not None and first <= cron.place(tick) <= last:
            tick = cron.tick_beyond(last)
    return tick


def jitter_offset(name: str, seconds: float) -> float:
    """The same part of `seconds` for the same name, always and everywhere."""
    return zlib.crc32(name.encode()) / 2**32 * seconds


class Schedule(NamedTuple):
    """One @cron of a task."""

    cron: Cron
    misfire: str = "latest"     # of missed ticks run: latest, skip (none), all
    overlap: str = "allow"      # skip: not while the run before is unfinished
    jitter: float = 0.0         # seconds a run may be put off, never the tick
    alert_after: float | None = None    # seconds from a tick to a success at most


def scheduled(app: App, expr: str, tz: str, misfire: str, overlap: str,
              jitter: Any, alert_after: Any = None) -> Callable:
    """The decorator that App.cron() promises."""
    parsed = Cron(expr, tz)
    if parsed.never:
        raise CronError(expr, "fields", expr, "no year has such a date")
    if misfire not in ("latest", "skip", "all"):
        raise OptionError(f"misfire={misfire!r}: must be latest, skip or all")
    if overlap not in ("allow", "skip"):
        raise OptionError(f"overlap={overlap!r}: must be allow or skip")
    jitter = check_span("jitter", jitter)
    if alert_after is not None:
        alert_after = _alert_seconds(alert_after)
    schedule = Schedule(parsed, misfire, overlap, jitter, alert_after)

    def decorate(fn):
        if needs_arguments(fn.fn if isinstance(fn, Task) else fn):
            raise OptionError(
                f"@cron of {default_name(fn)}: it is run without arguments, and "
                "needs some"
            )
        task = fn if isinstance(fn, Task) else app.task(fn)
        task.schedules.append(schedule)
        return task

    return decorate


def _alert_seconds(value):
    if isinstance(value, str):
        value = checked("alert_after", parse_grace, value)
    seconds = check_span("alert_after", value)
    if not seconds:
        raise OptionError("alert_after=0: must be above 0, or None for never")
    return seconds


def late_tick(row: ScheduleRow, now: int) -> int | None:
    """The tick (unix s) that should have led to a success by now, if there is one.

    It is the first after the last success, or after the schedule was first known.
    """
    if row.alert_after is None:
        return None
    before = (row.last_tick or 1) * 1000 - 1
    base = max(row.success_at or 0, row.since or 0) or before
    try:
        tick = Cron(row.expr, row.tz).tick_after(base / 1000)
    except (CronError, ValueError, OverflowError, OSError):     # written by hand
        return None
    return tick if tick and now / 1000 > tick + row.alert_after else None


class Scheduler:
    """The schedules of some tasks, by name.  `log` takes an event and fields."""

    def __init__(self, tasks: dict[str, Entry], store: Store, log: Callable):
        self.tasks, self.store, self._log = tasks, store, log
        self._own: dict = {}            # (task, schedule) by what makes it known
        self._due: list = []            # rows read before, left for the next batch

    def count(self) -> int:
        """How many @cron there are in the app."""
        return sum(len(task.schedules) for task in self.tasks.values())

    def _known_by(self):
        own: dict = {}
        for task in self.tasks.values():
            for expr, tz, *about in task.schedules:
                cron = Cron(expr, tz)
                schedule = Schedule(cron, *about)
                says = task.name, " ".join(cron.expr.split()), cron.tz, 0
                while says in own:
                    says = (*says[:3], says[3] + 1)
                own[says] = task, schedule
        return own

    def register(self, now: int, drop: bool = True) -> None:
        """Make the rows of our schedules; one that is there keeps its ticks.  `drop`
        old ones, if the clock can be believed."""
        self._own = self._known_by()
        if self._own:
            known = {row[:4]: row for row in self.store.schedules()}
            self.store.put_schedules([
                self._registered(known.get(says), says, schedule, now)
                for says, (_, schedule) in self._own.items()
            ], drop)

    def _registered(self, row, says, schedule, now):
        """The row of a schedule; its next tick is that of our zone data."""
        about = schedule.misfire, schedule.overlap, schedule.jitter
        alert = schedule.alert_after
        if row is None:
            row = ScheduleRow._make(
                [*says, *about, None, None, "[]", now, now, None, None, alert, None])
            plan = self._plan(row, schedule, now)
            return row._replace(next_tick=plan.next_tick, done=json.dumps(plan.done))
        plan = self._plan(row, schedule, now)
        is_due = json.dumps(plan.done) != row.done      # fire() writes what follows
        next_tick = now // 1000 if is_due else plan.next_tick
        return ScheduleRow._make(
            [*says, *about, next_tick, None, row.done, now, now, None, None, alert,
             None])

    def fire(self, now: int) -> tuple[bool, float]:
        """Enqueue what is due, or a part of it; return (was there any, seconds until
        the next look)."""
        if not self._own:
            return False, _CRON_POLL
        due = self._due or self.store.due_schedules(now)
        due = [row for row in due if row[:4] in self._own]
        batch = self._batch(due, now)
        if batch:
            found = self.store.fire([step for step, _ in batch], BUSY_PATIENCE)
            for (step, plan), ids in zip(batch, found):
                self._report(step.row, plan, ids, now)
        fired = any(step.runs for step, _ in batch)
        self._due = due[len(batch):]
        if self._due:
            return fired, 0.0
        tick = self.store.next_tick(now)
        wait = _CRON_POLL if tick is None else tick - now / 1000
        return fired, min(_CRON_POLL, max(0.0, wait))

    def say_late(self, now: int, worker: str) -> None:
        """Say which of our schedules are late: each tick once, by one worker."""
        for row in self.store.schedules():
            tick = row[:4] in self._own and late_tick(row, now)
            what = f"late {row.name} {row.expr} {row.tz} {tick}"
            if tick and self.store.is_first(what, _LATE_MS, now):
                at, last = iso_time(tick * 1000), row.success_at
                self._log("late", schedule=row.name, name=row.task, expr=row.expr,
                          tick=at, last_success=last and iso_time(last))
                self.store.note_event(By(worker, "worker"), "late", row.name,
                                      f"no success since {at}", now)

    @property
    def has_alerts(self) -> bool:
        """True when one of our schedules may be late."""
        return any(s.alert_after is not None for _, s in self._own.values())

    def _batch(self, due, now):
        """(step, plan) of as many schedules as one transaction shall move on."""
        batch: list = []
        ticks = 0
        for row in due[:_CRON_BATCH]:
            task, schedule = self._own[row[:4]]
            plan = self._plan(row, schedule, now)
            batch.append((_step_of(row, plan, task, schedule, now), plan))
            ticks += len(plan.ticks) + plan.missed
            if ticks >= _CRON_BATCH_TICKS:
                break
        return batch

    def _plan(self, row, schedule, now):
        """The plan of a schedule; a row that cannot be read starts anew."""
        try:
            done = _ranges_of(row.done)
            return plan_ticks(schedule.cron, done, now / 1000, schedule.misfire)
        except (ValueError, TypeError, OverflowError, OSError) as exc:
            error = f"{type(exc).__name__}: {exc}"
            self._log("cron_error", schedule=row.name, expr=row.expr, error=error)
            return plan_ticks(schedule.cron, [], now / 1000, schedule.misfire)

    def _report(self, row, plan, ids, now):
        if ids is None:                 # another worker was first, and says it
            return
        _, schedule = self._own[row[:4]]
        about = {"schedule": row.name, "name": row.task, "expr": row.expr}
        for tick, task_id in zip(plan.ticks, ids):
            at = iso_time(tick * 1000)
            self._log("cron_fired", **about, task_id=task_id, tick=at)
        if len(ids) < len(plan.ticks):
            left_out = len(plan.ticks) - len(ids)
            self._log("cron_missed", **about, ticks=left_out, overlap="skip")
        if plan.missed:
            self._log("cron_missed", **about, ticks=plan.missed,
                      misfire=schedule.misfire)
        if row.set_at > now + AHEAD_MS:
            self._log("cron_missed", **about, ticks=0, clock_set_back=True)


def _ranges_of(text):
    """What bg_schedule.done says.  Raises ValueError or TypeError."""
    ranges = [[first, last] for first, last in json.loads(text)]
    ends = sum(ranges, [])
    if not all(type(end) is int for end in ends) or ends != sorted(ends):
        raise ValueError(f"done is {text[:80]!r}")
    return ranges


def _step_of(row, plan, task, schedule, now):
    """What becomes of a schedule's row by a plan, with the runs of its ticks."""
    says = " ".join(str(part) for part in row[:4])
    key = f"cron {says}" if schedule.overlap == "skip" else None
    late = to_ms(jitter_offset(says, schedule.jitter)) if schedule.jitter else 0
    new = row._replace(next_tick=plan.next_tick, done=json.dumps(plan.done), set_at=now)
    runs = []
    for tick in plan.ticks:
        run_at = max(now, tick * 1000 + late)
        runs.append(NewTask(
            task.name, task.queue, task.priority, key, task.policy.retries,
            task.timeout, SCHEDULED if run_at > now else QUEUED, run_at, now, tick,
            counted=True,
        ))
    return ScheduleStep(row, new, runs)


@chore
def cron_chore(worker: Worker) -> Chore:
    """Register the schedules of a worker that starts, and fire what is due."""
    scheduler = Scheduler(worker.registry.tasks, worker.store, worker.journal.say)
    scheduler.register(worker.store.now(), drop=not worker.house.upkeep.is_in_doubt)
    if scheduler.count():
        worker.journal.say("scheduler_start", schedules=scheduler.count())

    def fire(now):
        fired, wait = scheduler.fire(now)
        worker.lookout.news |= fired
        return wait

    def say_late(now):
        if scheduler.has_alerts and not worker.house.upkeep.is_in_doubt:
            scheduler.say_late(now, worker.settings.worker_name)

    worker.house.chores.append(Chore(_LATE_LOOK_SECONDS, say_late))
    return Chore(_CRON_POLL, fire, is_punctual=True)


# == Reports ==================================================================
# Owns what people and programs read of a queue: first plain dicts, which --json
# prints as they are, then aligned text.  Times are ISO 8601 in UTC, durations and
# ages are seconds.  Knows no SQL, and changes nothing.

_STATS_HOURS = 24.0             # that stats looks back, if nobody says how many
_TEXT_WIDTH = 60                # characters of a long value in a table
_STATE_COLOURS = {
    "running": 36, "success": 32, "failed": 31, "retrying": 33, "cancelled": 90,
}


def local_time(stamp: str | None, shape: str = "%Y-%m-%d %H:%M:%S") -> str:
    """A time of a report on this machine's clock, for eyes; `-` for none."""
    try:
        moment = datetime.fromisoformat((stamp or "").replace("Z", "+00:00"))
        return moment.astimezone().strftime(shape)
    except (ValueError, OverflowError, OSError):    # none, or written by hand
        return stamp or "-"


def _clock_note():
    return time.strftime("times are local: %Z, UTC%z")


def _when(at):
    return None if at is None else iso_time(at)


def _readable(text):
    """An encoded value as JSON can show it: other types as their repr()."""
    if text is None:
        return None
    try:
        value = decode(text)
    except Exception:               # edited by hand: whatever its types may raise
        return str(text)
    try:
        return json.loads(json.dumps(value, default=repr))
    except (TypeError, ValueError, RecursionError):
        return str(text)


def task_report(store: Store, row: TaskRow, workers: dict | None = None) -> dict:
    """One task as `list` shows it; `workers` are the names of those that are there."""
    error = store.error(row.id)
    waited = row.started_at and max(0, row.started_at - row.run_at) / 1000
    return {
        "id": row.id, "name": row.name, "status": row.status, "queue": row.queue,
        "priority": row.priority, "key": row.key, "attempt": row.attempt,
        "retries": row.retries, "worker": row.worker,
        "worker_name": (workers or {}).get(row.worker), "timeout": row.timeout,
        "created_at": _when(row.created_at), "run_at": _when(row.run_at),
        "started_at": _when(row.started_at), "finished_at": _when(row.finished_at),
        "duration": row.duration, "waited": waited,
        "scheduled_for": _when(row.tick and row.tick * 1000),
        "error": str(TaskError(error)) if error else None,
    }


def show_report(store: Store, task_id: int) -> dict:
    """One task with all that is kept of it.  Raises TaskNotFound."""
    row = store.task(task_id)
    _, result, error = store.outcome(task_id)
    call = _readable(store.args(task_id))
    is_call = isinstance(call, list) and len(call) == 2
    args, kwargs = call if is_call else (call, None)
    return {
        **task_report(store, row), "args": args, "kwargs": kwargs,
        "result": _readable(result), "error": error,
        "output": store.output(task_id), "progress": store.progress(task_id),
        "cancel_asked": bool(row.cancel_asked and row.state == RUNNING),
    }


def page_report(store: Store, filter: Filter, limit: int = 50,
                before: str | None = None, seconds: float = 0.15) -> dict:
    """Tasks in the order of Store.page(), what comes `next`, and how far it looked."""
    page = store.page(filter, before, limit, seconds)
    names = {row.id: row.name for row in store.workers()}
    found = None if page.searched_to is None else {
        "id": page.searched_to, "at": _when(page.searched_at)}
    tasks = []
    for row in page.rows:
        with contextlib.suppress(TaskNotFound):         # deleted a moment ago
            tasks.append(task_report(store, row, names))
    return {"tasks": tasks, "next": page.next, "searched_to": found}


# What stands for what differs from one failure to another of the same kind.
_VARYING = re.compile(r"""'[^']*'|"[^"]*"|\b(?:0x)?(?=\w*\d)[0-9a-fA-F]{8,}\b|\d+""")
_LONGEST_ERROR = 300            # characters of an error's message


def failure_key(row: FailureRow) -> tuple:
    """Equal for two that went wrong in the same way."""
    return row.name, row.kind, row.type, _VARYING.sub("…", row.message)


def failure_groups(rows: Sequence[FailureRow], now: int) -> list[dict]:
    """The failures by what went wrong, the largest group first.

    Two are the same if they are but for numbers, hex and what stands in quotes, for
    which the text has … then.
    """
    groups: dict = {}
    for row in rows:
        groups.setdefault(failure_key(row), []).append(row)
    reports = (_failure_group(key, group, now) for key, group in groups.items())
    return sorted(reports, key=lambda row: (-row["count"], row["name"]))


def _failure_group(key, rows, now):
    newest = max(rows, key=lambda row: (row.finished_at, row.id))
    is_same = all(row.message == newest.message for row in rows)
    message = newest.message if is_same else key[3]
    error = {"kind": newest.kind, "type": newest.type, "message": message}
    return {
        "count": len(rows), "name": newest.name, "queue": newest.queue,
        "kind": newest.kind, "type": newest.type, "pattern": key[3],
        "error": str(TaskError(error))[:_LONGEST_ERROR],
        "first_at": _when(min(row.finished_at for row in rows)),
        "last_at": _when(newest.finished_at),
        "last_age": max(0, now - newest.finished_at) / 1000,
        "ids": sorted((row.id for row in rows), reverse=True)[:3],
    }


def inspect_report(store: Store, now: int, worker_timeout: float,
                   is_exact: bool = False) -> dict:
    """The state of everything: tasks, queues, workers, schedules.

    All tasks are counted but for those that succeeded: of these it is the runs of the
    last 24 hours that did, unless `is_exact`, which takes long where there are many.
    """
    states = dict.fromkeys(STATE_NAMES, 0)
    tasks: dict[tuple, dict] = {}
    counts = store.counts() if is_exact else store.indexed_counts()
    if not is_exact:
        counts += [(row.queue, row.name, SUCCESS, _successes(row)) for row in
                   store.history(QUARTER, now - DAY_MS, now + 1, by="name")]
    for queue, name, state, count in sorted(counts):
        word = state_name(state)
        if count:
            states[word] = states.get(word, 0) + count
            row = tasks.setdefault((queue, name), {"queue": queue, "name": name})
            row[word] = count
    return {
        "database": store.path, "states": states,
        "succeeded": "ever" if is_exact else "in 24 h", "tasks": list(tasks.values()),
        "paused_queues": store.paused_queues(),
        "workers": _worker_reports(store, now, worker_timeout),
        "schedules": cron_report(store),
    }


def _successes(row):
    return row.runs - row.failed - row.retried - row.cancelled


def _worker_reports(store, now, worker_timeout):
    running, is_dead = store.running_counts(), judge_of(store)
    ages = ((row, max(0, now - row.beat_at) / 1000) for row in store.workers())
    return [{
        "id": row.id, "name": row.name, "pid": row.pid, "host": row.host,
        "queues": json.loads(row.queues) if row.queues else None,
        "concurrency": row.concurrency, "start_method": row.start_method or None,
        "started_at": _when(row.started_at),
        "heartbeat_age": age, "stale": age > worker_timeout, "dead": is_dead(row),
        "running": running.get(row.id, 0),
    } for row, age in ages]


def cron_report(store: Store) -> list[dict]:
    """Every schedule with its last and its next tick."""
    return [
        {
            "schedule": row.name, "task": row.task, "expr": row.expr, "tz": row.tz,
            "misfire": row.misfire, "overlap": row.overlap, "jitter": row.jitter,
            "last": _when(row.last_tick and row.last_tick * 1000),
            "next": _when(row.next_tick and row.next_tick * 1000),
            "seen_at": _when(row.seen_at),
        }
        for row in store.schedules()
    ]


def percentile(values: Sequence[float], part: float) -> float | None:
    """The value below which `part` (0 to 1) of the sorted values lie."""
    if not values:
        return None
    return values[min(len(values) - 1, int(part * len(values)))]


def stats_report(store: Store, now: int, hours: float = _STATS_HOURS) -> list[dict]:
    """Per task: its runs that ended in the last `hours`, whatever became of the task.

    About: from the minute, the quarter of an hour or the day in which they begin, as
    far as that is still known.  Half of the runs, and 95 %, took and waited no longer
    than that.  per_minute is of the last hour.
    """
    span = next((span for span, kept in HISTORY_KEPT.items() if kept >= hours * 3600),
                DAY)
    rows = _by_name(store, span, now - to_ms(hours * 3600), now)
    recent = _by_name(store, MINUTE, now - HOUR_MS, now)
    return [_task_stats(row, recent.get(name)) for name, row in sorted(rows.items())]


def _by_name(store, length, since, now):
    found: dict[str, list] = {}
    for row in store.history(length, since, now + 1, by="name"):
        found.setdefault(row.name, []).append(row)
    return {name: merged(rows) for name, rows in found.items()}


def _task_stats(row, recent):
    return {
        "name": row.name, "runs": row.runs, "failed": row.failed,
        "retried": row.retried, "cancelled": row.cancelled,
        "per_minute": round(recent.runs / 60, 3) if recent else 0.0,
        "duration_p50": quantile(row.ran, 0.5), "duration_p95": quantile(row.ran, 0.95),
        "waited_p50": quantile(row.waited, 0.5),
        "waited_p95": quantile(row.waited, 0.95),
    }


# Text.  A table is a list of dicts and the columns to show of them.


def span(seconds: float | None) -> str:
    """Seconds for eyes: 12 ms, 3.4 s, 5 min, 2.1 h, 9 d."""
    if seconds is None:
        return "-"
    for least, unit, name in ((86400, 86400, "d"), (3600, 3600, "h"), (100, 60, "min")):
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _cell(value):
    if value is None:
        return "-"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "-"
    text = visible(" ".join(str(value).split()))
    return text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 1] + "…"


def table(rows: list[dict], columns: Sequence[str], colour: bool = False) -> str:
    """Aligned text: numbers to the right, headers on top."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, found)) for found in zip(columns, *cells)]
    right = [
        all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        for column in columns
    ]
    lines = []
    for found in [[c.upper() for c in columns], *cells]:
        parts = [
            text.rjust(width) if numeric else text.ljust(width)
            for text, width, numeric in zip(found, widths, right)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(_coloured(line) if colour else line for line in lines)


def _coloured(line):
    for word, code in _STATE_COLOURS.items():
        line = re.sub(rf"\b{word}\b", f"\033[{code}m{word}\033[0m", line, count=1)
    return line


def _shown(row):
    """A task's dict with its times for eyes."""
    waits = row["status"] in ("scheduled", "retrying")
    return {
        **row, "ran": span(row["duration"]), "waited": span(row["waited"]),
        "created": local_time(row["created_at"]),
        "due": local_time(row["run_at"]) if waits else None,
        "worker": row["worker_name"] or row["worker"],
    }


def list_text(report: dict, colour: bool = False) -> str:
    """A line for each task."""
    shown = [_shown(row) for row in report["tasks"]]
    columns = ["id", "status", "name", "queue", "attempt", "worker", "created", "due",
               "waited", "ran", "error"]
    for column in ("worker", "due"):
        if not any(row[column] for row in shown):
            columns.remove(column)
    lines = [table(shown, columns, colour), _clock_note()] if shown else ["no tasks"]
    return "\n".join(lines)


def searched_text(report: dict) -> str:
    """How far a list looked for tasks, where it did not come to the end."""
    found = report["searched_to"]
    back = f"searched back to {local_time(found['at'])}, task {found['id']}"
    return f"{back}; --all goes on"


def failure_groups_text(report: dict, colour: bool = False) -> str:
    """A line for each group of failures."""
    if not report["groups"]:
        return "no task has failed"
    rows = [{**row, "first": local_time(row["first_at"]),
             "last": local_time(row["last_at"])} for row in report["groups"]]
    lines = [table(rows, ("count", "name", "error", "first", "last", "ids"))]
    if report["capped"]:
        lines.append(f"of the newest {report['total']:,} failures only")
    return "\n".join([*lines, _clock_note()])


def events_text(rows: list[dict], colour: bool = False) -> str:
    """A line for each event."""
    if not rows:
        return "nobody has done anything yet"
    shown = [{**row, "when": local_time(row["at"])} for row in rows]
    columns = ("when", "who", "how", "action", "target", "detail")
    return f"{table(shown, columns)}\n{_clock_note()}"


def show_text(report: dict, colour: bool = False) -> str:
    """Every field on a line of its own, long texts below."""
    long = ("error", "output")
    lines = [
        f"{key:<14} {_plain(key, value)}" for key, value in report.items()
        if key not in long and value not in (None, False)
    ]
    error = report["error"]
    if error:
        lines += [f"{'error':<14} {TaskError(error)}", error.get("traceback", "")]
    if report["output"]:
        lines += ["output:", report["output"]]
    text = visible("\n".join(line.rstrip() for line in lines if line))
    return _coloured(text) if colour else text


def _plain(key, value):
    if key in ("duration", "waited", "timeout"):
        return span(value)
    if key.endswith("_at") or key == "scheduled_for":
        return local_time(value, "%Y-%m-%d %H:%M:%S %z")
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=repr)


def inspect_text(report: dict, colour: bool = False) -> str:
    """The overview: states, tasks, workers, schedules."""
    states = "  ".join(f"{name} {n:,}" for name, n in report["states"].items() if n)
    if report["succeeded"] != "ever" and report["states"]["success"]:
        states += f"  (success: {report['succeeded']}; --exact counts all)"
    parts = [f"database  {report['database']}", f"tasks     {states or 'none'}"]
    if report["paused_queues"]:
        parts.append(f"paused    {', '.join(report['paused_queues'])}")
    if report["tasks"]:
        used = [s for s in STATE_NAMES if any(s in row for row in report["tasks"])]
        rows = [{**dict.fromkeys(used, 0), **row} for row in report["tasks"]]
        parts += ["", table(rows, ["queue", "name", *used])]
    parts += ["", _workers_text(report["workers"])]
    if report["schedules"]:
        parts += ["", cron_text(report["schedules"])]
    text = visible("\n".join(parts))
    return _coloured(text) if colour else text


def _workers_text(workers):
    if not workers:
        return "no worker is running: python pybgworker.py run --app MODULE"
    columns = ("worker", "pid", "host", "queues", "concurrency", "start_method",
               "running", "heartbeat")
    rows = [
        {
            **row, "worker": row["name"], "queues": row["queues"] or "all",
            "start_method": (row["start_method"] or "").partition(",")[0],
            "heartbeat": f"{span(row['heartbeat_age'])} ago{_doubts(row)}",
        }
        for row in workers
    ]
    why = [f"{row['name']}: {row['start_method']}" for row in workers
           if "," in (row["start_method"] or "")]
    return "\n".join([table(rows, columns), *why])


def _doubts(row):
    """Why a worker may do nothing; its tasks go on as soon as another one looks."""
    return " DEAD" if row["dead"] else " STALE" if row["stale"] else ""


def stats_text(rows: list[dict], colour: bool = False) -> str:
    """A line for each task, times for eyes."""
    if not rows:
        return "no run has ended in this time"
    times = [key for key in rows[0] if key.startswith(("duration_", "waited_"))]
    shown = [{**row, **{f"≈{key}": span(row[key]) for key in times}} for row in rows]
    columns = ["name", "runs", "failed", "retried", "per_minute",
               *(f"≈{key}" for key in times)]
    return table(shown, columns)


def cron_text(rows: list[dict], colour: bool = False) -> str:
    """A line for each schedule."""
    if not rows:
        return "no schedules: a worker registers them when it starts"
    times = ("last", "next")
    shown = [{**row, **{key: local_time(row[key]) for key in times}} for row in rows]
    columns = ["schedule", "expr", "tz", *times, "misfire", "overlap"]
    return f"{table(shown, columns)}\n{_clock_note()}"


# == Reading ==================================================================
# Owns the commands with which people look at a queue; none of them changes it.

_LIST_SECONDS = 1.0         # that `list` looks for tasks
_MOST_GROUPED = 1000        # failures that `failed --by` looks at: the newest

NAME_FLAG = flag("--name", metavar="N", help="only tasks of this name (default: all)")
QUEUE_FLAG = flag("--queue", metavar="Q",
                  help="only tasks of this queue (default: all)")
FILTER_FLAGS = (
    NAME_FLAG, QUEUE_FLAG,
    flag("--since", metavar="T", type=typed(parse_grace),
         help="only what ended, else began, else came in so long ago at most: 90s, "
         "12h, 7d; a bare number is seconds (default: all)"),
    flag("--error", metavar="TYPE",
         help="only those whose last run ended with this type of exception, or with a "
         "timeout, crash, lost or abort (default: all)"),
)
_LIMIT = flag("--limit", metavar="N", type=typed(parse_count), default=50,
              help="rows at most (default: 50)")


_ALL_FLAG = flag("--all", action="store_true",
                 help="look at all tasks, however long it takes (default: a second)")


def filter_of(args: Any, now: int, state: int | None = None) -> Filter:
    """The tasks that the flags of a command mean."""
    since = None if args.since is None else now - to_ms(args.since)
    return Filter(state, args.name, args.queue, None, since, args.error)


def queue_hint(store: Store, queue: str | None) -> str:
    """What to say of a queue that nobody knows; nothing of one that somebody does."""
    known = {row.name for row in store.queues(store.now())}
    known.update(row.queue for row in store.totals())
    for worker in store.workers():
        with contextlib.suppress(ValueError, TypeError):        # edited by hand
            known.update(json.loads(worker.queues or "[]"))
    if queue is None or queue in known:
        return ""
    import difflib

    near = difflib.get_close_matches(queue, sorted(map(str, known)), 1)
    if known and not near:
        near = [f"one of {', '.join(sorted(map(str, known))[:5])}"]
    return "".join(f"no queue {queue} has tasks; did you mean {n}?" for n in near)


def say_aside(text: str) -> None:
    """Print it beside what the command prints, if it is anything."""
    if text:
        print(f"pybgworker: {visible(text)}", file=sys.stderr)


def _printed(args, report, text):
    """The report as JSON or as text, as the flags and the terminal want it."""
    if args.json:
        return json.dumps(report, indent=2, default=repr)
    colour = is_terminal(sys.stdout) and "NO_COLOR" not in os.environ
    return text(report, colour)


@command("inspect", "show tasks by state, workers, schedules", "inspect --json",
         flag("--exact", action="store_true",
              help="count all tasks, also those that succeeded: reads the whole table"),
         reads=True)
def _inspect(args, app):
    report = inspect_report(app.store, app.store.now(), app.settings.worker_timeout,
                            args.exact)
    return _printed(args, report, inspect_text)


@command("list", "list tasks: the newest first; what failed by its end, what waits by "
         "its turn", "list --status running --limit 20",
         flag("--status", choices=STATE_NAMES, metavar="S",
              help=f"only {', '.join(STATE_NAMES)} ones (default: all)"),
         *FILTER_FLAGS, _LIMIT,
         _ALL_FLAG, reads=True)
def _list(args, app):
    state = None if args.status is None else STATE_NAMES.index(args.status)
    return _listed(args, app, state)


def _listed(args, app, state):
    report = page_report(
        app.store, filter_of(args, app.store.now(), state), args.limit,
        seconds=math.inf if args.all else _LIST_SECONDS)
    is_cut = report["next"] is not None and len(report["tasks"]) < args.limit
    shown = report["tasks"] if args.json else _printed(args, report, list_text)
    if not report["tasks"] and not is_cut:
        say_aside(queue_hint(app.store, args.queue))
    if is_cut and args.json:
        say_aside(searched_text(report))
    elif is_cut:
        shown += f"\n{searched_text(report)}"
    return _printed(args, shown, None) if args.json else shown


@command("failed", "list the tasks that failed for good, the last to end first",
         "failed --by error --since 1h", *FILTER_FLAGS, _LIMIT, _ALL_FLAG,
         flag("--by", choices=("error",),
              help="a line for each error, numbers and quoted texts aside, with the "
              f"newest ids; of the newest {_MOST_GROUPED:,} (default: a line a task)"),
         reads=True)
def _failed(args, app):
    if args.by is None:
        return _listed(args, app, FAILED)
    of, now = filter_of(args, app.store.now()), app.store.now()
    rows = app.store.failures(of.since or 0, limit=_MOST_GROUPED)
    fits = [row for row in rows if of.name in (None, row.name)
            and of.queue in (None, row.queue)
            and of.error in (None, row.type, row.kind)]
    report = {"groups": failure_groups(fits, now)[:args.limit], "total": len(rows),
              "capped": len(rows) == _MOST_GROUPED}
    if not fits:
        say_aside(queue_hint(app.store, args.queue))
    return _printed(args, report, failure_groups_text)


def _hours(text):
    """A number of hours that history can know of."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= HISTORY_KEPT[DAY] / 3600:
            return float(text)
    raise ValueError(f"a number of hours, up to {HISTORY_KEPT[DAY] // 3600}")


@command("stats", "show runs, durations and waiting times of each task", "stats",
         flag("--hours", metavar="N", type=typed(_hours), default=24.0,
              help="runs that ended in the last N hours (default: 24)"), reads=True)
def _stats(args, app):
    report = stats_report(app.store, app.store.now(), args.hours)
    return _printed(args, report, stats_text)


@command("cron", "show schedules with their last and next run", "cron", reads=True)
def _cron(args, app):
    return _printed(args, cron_report(app.store), cron_text)


@command("events", "show what people have done, the newest first", "events", _LIMIT,
         reads=True)
def _events(args, app):
    rows = [{**row._asdict(), "at": iso_time(row.at)}
            for row in app.store.events(limit=args.limit)]
    return _printed(args, rows, events_text)


# == Acts =====================================================================
# Owns the commands with which people act on a queue.  Each writes down who did it.

_CANCEL_PATIENCE = 2.0      # seconds that `cancel` waits for a running task's end
_PRUNE_ROWS = 1000          # looked at by one transaction of `prune`
_START_MS = 5000            # within which a worker that starts registers its schedules


def _whole_number(text):
    if not re.fullmatch(r"-?\d{1,9}", text):
        raise ValueError("a whole number")
    return int(text)


_YES = flag("--yes", action="store_true", help="do not ask")


def by_me():
    """Who calls this command."""
    return By(login_name(), "cli")


def _each(texts, act):
    """Do it for every id; what fails does not keep the others from being done."""
    lines, problems = [], []
    for text in texts:
        try:
            lines.append(act(parse_id(text)))
        except PyBgWorkerError as exc:
            problems.append(str(exc))
    if lines:
        print_text("\n".join(lines))
    if problems:
        raise Problem("\n".join(problems))


class _Bulk:
    """Does something to all tasks of a filter that are there now, and to no others."""

    def __init__(self, app: App, action: str, filter: Filter):
        self.store, self.action, self.filter = app.store, action, filter
        self.now = self.store.now()
        newest = self.store.page(Filter(), limit=1).rows
        self.max_id = newest[0].id if newest else 0
        self.done = 0
        self.reasons: collections.Counter = collections.Counter()

    def count(self) -> int:
        """How many it would be done to."""
        of, states = self.filter, ABOUT[self.action]
        return sum(self.store.count(of._replace(state=state), self.max_id)
                   for state in (states if of.state is None else (of.state,)))

    def run(self, spread: float = 0.0) -> None:
        """All of them, some at a time."""
        after = None
        while True:
            acted = self.store.act(self.action, self.filter, self.now, by_me(),
                                   self.max_id, spread, after=after)
            self.done += acted.done
            self.reasons.update(acted.reasons)
            after = acted.next
            if not acted.left:
                return


def _words(filter):
    """What a filter means, after the word tasks."""
    said = filter._asdict()
    parts = [f"of queue {said['queue']}"] * (said["queue"] is not None)
    parts += [f"named {said['name']!r}"] * (said["name"] is not None)
    parts += [f"with {said['error']}"] * (said["error"] is not None)
    if said["since"] is not None:
        parts.append(f"since {local_time(iso_time(said['since']))}")
    return "".join(f" {part}" for part in parts)


@command("retry", "run finished tasks again, and those now that wait for their time",
         "retry --failed --name mail.send --since 1h",
         flag("ids", nargs="*", default=[], metavar="ID"),
         flag("--failed", action="store_true", help="all that failed"),
         flag("--cancelled", action="store_true", help="all that were cancelled"),
         *FILTER_FLAGS,
         flag("--spread", metavar="T", type=typed(parse_grace), default=0.0,
              help="not all at once, but evenly over this time: 10m (default: 0)"),
         _YES)
def _retry(args, app):
    is_all, store = args.failed or args.cancelled, app.store
    if bool(args.ids) + args.failed + args.cancelled != 1:
        raise UsageError("retry takes the ids of tasks, or --failed, or --cancelled")
    if not is_all and any((args.name, args.queue, args.since, args.error)):
        raise UsageError("--name, --queue, --since and --error go with --failed or "
                         "--cancelled")

    def again(task_id):
        acted = store.act("retry", [task_id], store.now(), by_me(), spread=args.spread)
        if acted.done:
            row = store.task(task_id)
            return f"task {task_id} is queued again" if row.state not in LATER \
                else f"task {task_id} is due at {local_time(iso_time(row.run_at))}"
        store.task(task_id)             # or there is none
        why, = acted.reasons
        if why.startswith("is "):
            raise TaskStateError(f"task {task_id} {why}: only a finished one, or one "
                                 "that waits for its time, can be retried")
        raise TaskStateError(f"task {task_id}: {why}")

    return _retry_all(args, app) if is_all else _each(args.ids, again)


def _retry_all(args, app):
    word = "failed" if args.failed else "cancelled"
    bulk = _Bulk(app, "retry", filter_of(args, app.store.now(),
                                         FAILED if args.failed else CANCELLED))
    words = _words(bulk.filter)
    over = f", over {span(args.spread)}" if args.spread else ""
    _confirm(args, lambda: f"Retry {bulk.count():,} {word} tasks{words}{over}?")
    bulk.run(args.spread)
    if bulk.done:
        print_text(f"{bulk.done:,} tasks are queued again" if not over
                   else f"{bulk.done:,} tasks run again{over}")
    held = bulk.reasons[KEY_HELD]
    if held:
        raise Problem(f"{held:,} tasks were left: {KEY_HELD}")
    if not bulk.done:
        hint = queue_hint(app.store, args.queue)
        raise Problem(f"nothing to retry: no task{words} is {word}"
                      + (hint and f"; {hint}"))


@command("cancel", "cancel waiting tasks, end running ones", "cancel 42 43",
         flag("ids", nargs="+", metavar="ID"))
def _cancel(args, app):
    def end(task_id):
        before = app.store.cancel(task_id, app.store.now(), by_me())
        if before in FINISHED:
            raise TaskStateError(
                f"task {task_id} is {state_name(before)} already: nothing to cancel"
            )
        if before == RUNNING:
            reap_surely_dead(app.store, app.store.now())
        deadline = time.monotonic() + _CANCEL_PATIENCE
        while app.store.state(task_id) == RUNNING and time.monotonic() < deadline:
            time.sleep(0.02)
        state = app.store.state(task_id)
        if state == RUNNING:
            return f"task {task_id} still runs: its worker has been asked to end it"
        return f"task {task_id} is {state_name(state)}"

    return _each(args.ids, end)


@command("purge", "cancel all waiting tasks", "purge --queue mail --yes",
         *FILTER_FLAGS, _YES)
def _purge(args, app):
    bulk = _Bulk(app, "cancel", filter_of(args, app.store.now()))
    words = _words(bulk.filter) or " of all queues"
    _confirm(args, lambda: f"Cancel {bulk.count():,} waiting tasks{words}?")
    bulk.run()
    if not bulk.done:
        say_aside(queue_hint(app.store, args.queue))
    return f"{bulk.done:,} tasks cancelled"


@command("prune", "delete finished tasks past their retention",
         "prune --older-than 1d --yes",
         flag("--older-than", metavar="T", type=typed(parse_grace),
              help="finished so long ago: 90s, 12h, 7d; a bare number is seconds "
              "(default: the retention)"), _YES)
def _prune(args, app):
    s, now = app.settings, app.store.now()
    keep, keep_failed = s.retention, s.retention_failed
    if args.older_than is not None:
        keep = keep_failed = args.older_than
    limits = finished_before(keep, now), finished_before(keep_failed, now)
    _confirm(args, lambda: _prune_question(app.store, *limits))
    deleted, cursor = app.store.prune(0, *limits, _PRUNE_ROWS, by_me(), now)
    while cursor:
        more, cursor = app.store.prune(cursor, *limits, _PRUNE_ROWS, by_me(), now)
        deleted += more
        app.store.housekeep()
    return f"{deleted} tasks deleted"


def _prune_question(store, before, failed_before):
    count = store.count_old(before, failed_before)
    done, failed = (
        "none" if limit is None else f"before {local_time(iso_time(limit))}"
        for limit in (before, failed_before)
    )
    return f"Delete {count} tasks (success, cancelled: {done}; failed: {failed})?"


def _confirm(args, question):
    """Ask on a terminal; elsewhere the command is meant."""
    if args.yes or not is_terminal(sys.stdin):
        return
    try:
        answer = input(f"{question()} [y/N] ")
    except EOFError:                    # Ctrl-D
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise Problem("nothing was changed")


@command("enqueue", "enqueue a task by name, with arguments in JSON",
         "enqueue tasks.add 1 b=2",
         flag("name", metavar="NAME", help="module.function, or its name="),
         flag("arguments", nargs="*", default=[], metavar="[KEY=]JSON",
              help="""1 '"text"' key='[1, 2]'"""),
         flag("--app", metavar="MODULE[:APP]", help="the module that defines the task "
              "(default: goes by the newest task of that name)"),
         flag("--queue", metavar="Q", help="where it waits (default: the task's own)"),
         flag("--countdown", metavar="S", type=typed(parse_grace),
              help="when it is due: seconds from now, or 90s, 15m, 12h, 7d "
              "(default: at once)"),
         flag("--key", metavar="K",
              help="at most one unfinished task has this key (default: none)"),
         flag("--priority", metavar="P", type=typed(_whole_number),
              help="a whole number, lower runs first (default: the task's own)"))
def _enqueue(args, app):
    checked("name", parse_name, args.name)
    if args.app:
        app = import_app(args.app)
        app.override(db=args.db)
        _check_task(app, args)
    values, kwargs = _call_of(args.arguments)
    given = {k: getattr(args, k) for k in ("queue", "countdown", "key", "priority")}
    options = {k: v for k, v in given.items() if v is not None}
    is_new = not os.path.exists(app.store.path)
    if args.name not in app.tasks:
        options = {**_newest_options(app, args.name, given), **options}
    result = app.send(args.name, *values, kwargs=kwargs, **options)
    if is_new:
        print(f"pybgworker: made the database {app.store.path}", file=sys.stderr)
    _warn(app, result.id)
    return str(result.id)


def _warn(app, task_id):
    """Say it if there are workers, and none takes this task."""
    store, timeout = app.store, app.settings.worker_timeout
    row, live = store.task(task_id), live_workers(store, store.now(), timeout)
    paused = store.paused_queues()
    if not (live or row.queue in paused) or row.state in FINISHED:
        return
    event, about = why_nobody(
        row.queue, row.name, live, store.known_tasks(), paused) or ("", {})
    near = about.get("near")
    say = {
        "queue_paused": f"queue {row.queue} is paused: the task waits until "
                        f"`resume {row.queue}`",
        "unserved": f"no live worker serves queue {row.queue}: the task waits for one",
        "unknown_task": f"no live worker knows {row.name}"
                        f"{near and f' (did you mean {near}?)' or ''}: the task waits "
                        "for one that does",
    }.get(event)
    if say:
        print(f"pybgworker: {visible(say)}", file=sys.stderr)


def _check_task(app, args):
    """Raise Problem that names what is near, for a task that the app has not."""
    if args.name in app.tasks:
        return
    import difflib

    names = sorted(name for name in app.tasks if not callback_kind(name))
    near = difflib.get_close_matches(args.name, names, cutoff=0.5) or names[:5]
    raise Problem(
        f"--app {args.app} has no task {args.name!r}; it has {', '.join(near)}"
        f"{'' if len(near) == len(names) else ', …'}"
    )


def _call_of(arguments):
    """(positional, keyword arguments) of JSON texts, of which some say `name=`.

    Nothing that is JSON looks like that.
    """
    values, kwargs = [], {}
    for argument in arguments:
        named = re.match(r"([^\W\d]\w*)=", argument)
        name, text = named and named[1], argument[named.end() if named else 0:]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise UsageError(
                f"argument {argument!r} is not JSON: a string needs quotes inside the "
                f"shell's, '{name + '=' if name else ''}\"{text}\"'"
            ) from None
        if name:
            kwargs[name] = value
        else:
            values.append(value)
    return values, kwargs


def _newest_options(app, name, given):
    """What is known of a task without its app: how it was enqueued the last time."""
    app.store.create()
    found = app.store.newest_options(name)
    if not found and given["queue"] is None:
        print(
            f"pybgworker: no task {name!r} was here before, so it goes to the queue "
            "default, with the options of a bare @task; --app takes its own",
            file=sys.stderr,
        )
    return found


@command("pause", "claim nothing from a queue", "pause mail --reason outage",
         flag("queue", metavar="QUEUE"),
         flag("--reason", metavar="TEXT",
              help="why, for whoever wonders (default: none)"))
def _pause(args, app):
    hint = queue_hint(app.store, args.queue)
    app.store.pause(args.queue, app.store.now(), by_me(), args.reason)
    say_aside(hint)
    return f"queue {args.queue} is paused: nothing is claimed from it until resume"


@command("resume", "claim from a queue again", "resume mail",
         flag("queue", metavar="QUEUE"))
def _resume(args, app):
    if not app.store.resume(args.queue, by_me()):
        hint = queue_hint(app.store, args.queue)
        raise Problem(f"queue {args.queue} is not paused" + (hint and f"; {hint}"))
    return f"queue {args.queue} goes on"


@command("forget-schedule", "delete a schedule that no worker serves any more",
         "forget-schedule reports.nightly", flag("schedule", metavar="NAME"))
def _forget_schedule(args, app):
    rows = [row for row in app.store.schedules() if row.name == args.schedule]
    if not rows:
        known = ", ".join(sorted({row.name for row in app.store.schedules()}))
        raise Problem(f"there is no schedule {args.schedule}"
                      + (f"; there are {known}" if known else ""))
    reap_surely_dead(app.store, app.store.now())
    since = min((row.started_at for row in app.store.workers()), default=math.inf)
    served = [row for row in rows if row.seen_at >= since - _START_MS]
    if served:
        raise Problem(f"a worker serves {args.schedule}: take @cron off its task, and "
                      "start the worker again")
    gone = [row for row in rows if app.store.forget_schedule(row, by_me())]
    if not gone:
        raise Problem(f"a worker has just registered {args.schedule}")
    return f"schedule {args.schedule} is forgotten"


# == Wording ==================================================================
# Owns how numbers, times, errors and workers are put in a sentence.  What comes from
# rows may be anything that an edit by hand can leave there.

_LONG_TEXT = 160            # characters of an error in a sentence


class Clock:
    """Times and spans in a sentence: on this machine's clock, with the zone once."""

    def __init__(self, now: int):
        self.now = now
        self._shape = " %Z"

    def at(self, at: int) -> str:
        """14:02:31 UTC; with the date if it is of another day."""
        stamp, days = iso_time(whole(at, 0)), "%Y-%m-%d"
        is_today = local_time(stamp, days) == local_time(iso_time(self.now), days)
        shape, self._shape = "%H:%M:%S" + self._shape, ""
        return local_time(stamp, shape if is_today else f"{days} {shape}")

    def since(self, at: int) -> str:
        """How long ago that was."""
        return lasting((self.now - whole(at, 0)) / 1000)

    def ago(self, at: int) -> str:
        """The same with `ago`; what is less than a second ago, or to come, is now."""
        is_now = self.now - whole(at, 0) < 1000
        return "just now" if is_now else f"{self.since(at)} ago"


def lasting(seconds: float) -> str:
    """A span for eyes, without decimals that are none: 12 s."""
    return span(seconds).replace(".0 ", " ") if seconds > 0 else "0 s"


def percent(part: float) -> str:
    """A part of 1 for eyes: 94 %."""
    return f"{100 * part:.3g} %" if part < 0.01 else f"{100 * part:.0f} %"


def counted(number: int, what: str, more: str = "") -> str:
    """1 task, 2,311 tasks; `more`: the plural, if it is no s that is appended."""
    return f"{number:,} {what if number == 1 else more or what + 's'}"


def listed(words: Sequence[str], most: int = 3) -> str:
    """a, b and c; of more than so many the first, and how many there are besides."""
    words = list(words) or [""]
    if len(words) > most:
        words = [*words[:most - 1], f"{len(words) - most + 1:,} more"]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def per_time(rate: float) -> str:
    """A rate as somebody would have written it: 100 a minute."""
    units = ((1, "a second"), (60, "a minute"), (3600, "an hour"), (86400, "a day"))
    for seconds, unit in units:
        times = rate * seconds
        if times >= 1 and abs(times - round(times)) < 1e-6 * times:
            return f"{round(times):,} {unit}"
    seconds, unit = next((u for u in units if rate * u[0] >= 1), units[-1])
    return f"{rate * seconds:.3g} {unit}"


def brief(text: Any) -> str:
    """A text from elsewhere as a part of a sentence: one line, not too long."""
    text = " ".join(str(text).split()).rstrip(".")
    return text if len(text) <= _LONG_TEXT else text[:_LONG_TEXT] + "…"


def end_of(error: dict | None) -> str:
    """What became of a run, after its name: `raised KeyError: 'x'`."""
    if not error:
        return "failed"
    kind, type_, text = (brief(error.get(k) or "") for k in ("kind", "type", "message"))
    if kind in ("exception", "abort"):
        return f"raised {type_ or 'an error'}{': ' * bool(text)}{text}"
    if kind == "timeout":
        return "was ended at its time limit"
    if kind == "lost":
        return "was lost with its worker"
    of = type_ and type_ not in text
    return f"crashed{f' with {type_}' if of else ''}{': ' * bool(text)}{text}"


def whole(value: Any, default: Any = None) -> Any:
    """A number as an int; the default for what is none, as edits by hand leave it."""
    is_number = isinstance(value, (int, float)) and abs(value) < 1e17
    return int(value) if is_number else default


def queues_of(worker: WorkerFacts) -> list[str] | None:
    """The queues that a worker serves; None: all."""
    queues = None
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        queues = json.loads(worker.row.queues or "null")
    return [str(queue) for queue in queues] if isinstance(queues, list) else None


def serves(worker: WorkerFacts, queue: str) -> bool:
    """True for a worker that claims from this queue."""
    queues = queues_of(worker)
    return queues is None or queue in queues


def knows(worker: WorkerFacts, name: str) -> bool:
    """False for a worker that has said what it knows, and this is not of it."""
    return worker.names is None or name in worker.names


def silence(worker: WorkerFacts, now: int) -> float:
    """Seconds since its last heartbeat."""
    return max(0, now - worker.row.beat_at) / 1000


def named(worker: WorkerFacts) -> str:
    """Its name, as a part of a sentence."""
    return brief(worker.row.name)


def has_database_trouble(worker: WorkerFacts) -> bool:
    """True when its note is about the database, else it is about its children."""
    return str(worker.row.note).startswith("cannot write")


# == Reasons ==================================================================
# Owns the reasons why a task is as it is: each has a code, which is stable, and one
# sentence, which is not.  Here are those of what is over, and of what runs.

# The README has this table.
REASONS = {
    "unknown_id": "there is no task with this id: it was never given, or the task was "
                  "deleted",
    "success": "it succeeded",
    "failed_abort": "it failed by `Abort`, which is not retried",
    "failed_class": "it failed by an exception that `retry_for` does not cover",
    "failed_used_up": "it failed, and no retries are left",
    "failed": "it failed, and what its last run left does not say why it was not "
              "retried",
    "cancelled": "it was cancelled",
    "key_held": "also: it cannot be retried while another task holds its key",
    "worker_dead": "it was running, but its worker is dead or gone",
    "worker_silent": "it was running, but its worker is not heard of",
    "ending": "it is running, and is being ended by a cancellation",
    "in_pipe": "a worker has claimed it; it waits behind another run in a child",
    "over_limit": "it is past its time limit, and is being ended",
    "running": "it is running",
    "due_later": "it waits for its time",
    "retry_later": "its last run failed; it waits for the next one",
    "no_worker": "no worker runs",
    "database": "the workers for it have trouble with the database",
    "paused": "its queue is paused",
    "not_served": "no worker serves its queue",
    "unknown_name": "no worker that serves its queue knows the task",
    "starting": "the workers for it are starting",
    "broken": "the workers for it cannot start children",
    "stopping": "the workers for it are stopping",
    "rate": "its rate limit, or that of all tasks, is used up",
    "max_running": "as many of its name run as `max_running` allows",
    "promotion": "it is due, and a worker is about to make it ready",
    "alone": "its last run died among others: it waits for a child with nothing to do",
    "busy": "others are before it, or all children are busy",
    "starved": "tasks of lower priority numbers come as fast as they are done",
    "next": "nothing holds it: it is about to start",
    "unknown_state": "its row was edited to a state that there is not",
}
START_COMMAND = "python -m pybgworker run --app MODULE"



class Reason(NamedTuple):
    """Why a task is as it is."""

    code: str               # one of REASONS
    say: str                # one sentence
    also: tuple = ()        # further (code, sentence): what holds it beside that
    until: int | None = None    # unix ms; when it changes by itself, if that is known
    facts: dict = {}        # the numbers that it was made of


class Found(NamedTuple):
    code: str
    say: str
    until: int | None = None


class Story:
    """What the facts about a task come to."""

    def __init__(self, facts: TaskFacts):
        self.facts, self.now = facts, facts.now
        self.task: Any = facts.task     # None: there is none
        self.live = [w for w in facts.workers if self.silence(w) < facts.worker_timeout]
        self.live = [w for w in self.live if w.row.id not in facts.dead]
        queue, name = facts.task[2:4] if facts.task else ("", "")
        self.serving = [w for w in self.live if serves(w, queue)]
        self.knowing = [w for w in self.serving if knows(w, name)]
        self.able = [w for w in self.knowing
                     if w.row.state not in ("starting", "stopping") and not w.row.note]

    def silence(self, worker):
        return silence(worker, self.now)

    @property
    def clock(self):
        """A new one for each sentence: each says its zone."""
        return Clock(self.now)

    @property
    def used(self):
        """Runs that count."""
        return max(0, self.task.attempt - self.task.forgiven)

    def worker(self):
        """The worker that has the task, or had it; None: it has no row."""
        return next((w for w in self.facts.workers if w.row.id == self.task.worker),
                    None)


# What is over, or is not there.


def absent(story):
    facts, clock = story.facts, story.clock
    act = facts.act
    if facts.id > facts.last_id:
        ids = f"ids given so far end at {facts.last_id:,}" if facts.last_id else \
            "none has been enqueued yet"
        say = f"There is no task {facts.id}: {ids}."
    elif act:
        say = f"Task {facts.id} was deleted at {clock.at(act.at)} by {_who(act)}."
    else:
        kept = "" if facts.retention in (None, math.inf) else \
            f": finished tasks are kept for {lasting(facts.retention)}"
        say = f"Task {facts.id} was deleted{kept}."
    return Found("unknown_id", say)


def _who(act):
    return f"{brief(act.who)} ({brief(act.how)})"


def _ended_at(story, clock):
    at = whole(story.task.finished_at)
    return f" at {clock.at(at)}, {clock.ago(at)}" if at else ""


def _succeeded(story):
    task, worker = story.task, story.worker()
    say = f"It succeeded{_ended_at(story, story.clock)}"
    if task.attempt:
        took, waited = task.duration, None
        if whole(task.started_at):
            waited = (task.started_at - task.run_at) / 1000
        say += f": run {task.attempt}"
        say += f" took {lasting(took)}" if whole(took) is not None else " did it"
        say += f" on {named(worker)}" if worker else ""
        say += f" after waiting {lasting(waited)}" if waited and waited > 0 else ""
    return Found("success", say + ".")


def _failed_why(story):
    task, error = story.task, story.facts.error
    say = f"It failed for good{_ended_at(story, story.clock)}: "
    if not error:
        return Found("failed", say + "what its last run left is not kept.")
    final, end = error.get("final"), end_of(error)
    if final == "abort" or error.get("kind") == "abort":
        return Found("failed_abort",
                      f"{say}run {task.attempt} {end}, and an abort is not retried.")
    if final == "retry_for":
        return Found("failed_class", f"{say}run {task.attempt} {end}, which retry_for"
                     f"{_classes(error.get('retry_for'))} does not cover.")
    if final == "used_up" or story.used > task.retries:
        return Found("failed_used_up", say + _used_up(story, end))
    return Found("failed", f"{say}run {task.attempt} {end}.")


def _classes(names):
    """What retry_for was, as in the program; nothing where that is not known."""
    names = [brief(name) for name in names] if isinstance(names, list) else []
    return f"={names[0]}" if len(names) == 1 else f"=({', '.join(names)})" * bool(names)


def _used_up(story, end):
    task, runs = story.task, story.used
    if runs < 2:
        return f"its only run {end}{', and it has no retries' * (not task.retries)}."
    kinds = collections.Counter(
        brief(run["type"] or run["kind"]) for run in story.facts.attempts
        if run["attempt"] > task.forgiven and (run["type"] or run["kind"]))
    kind, number = kinds.most_common(1)[0] if kinds else ("", 0)
    same = f", {number:,} with {kind}" if 1 < number < runs else ""
    every = "both" if runs == 2 else f"all {runs:,}"
    return f"{every} runs failed{same}; the last one {end}."


def _cancelled(story):
    task, act = story.task, story.facts.act
    say = f"It was cancelled{_ended_at(story, story.clock)}"
    say += f", by {_who(act)}" if act else ""
    if not task.attempt:
        say += ", before it had begun"
    return Found("cancelled", say + ".")


ENDS = {SUCCESS: _succeeded, FAILED: _failed_why, CANCELLED: _cancelled}


def held_key(story):
    holder = story.facts.holder
    if holder:
        yield Found("key_held", f"It cannot be retried while task {holder} holds its "
                     f"key, {brief(story.task.key)}.")


# What runs.  Of several that are true, the first is the sentence.


def at_work(story):
    found = [*_lost_worker(story)]
    if story.task.cancel_asked:
        act = story.facts.act
        asked = f"{brief(act.who)} asked for that {story.clock.ago(act.at)}" if act \
            else "somebody has cancelled it"
        found.append(Found("ending", f"It is running and is being ended: {asked}."))
    run = story.facts.run
    if found:
        return found
    if run and run.began_at is None:
        return [_in_pipe(story, run)]
    return [*_over_limit(story)] or [_runs(story)]


def _lost_worker(story):
    task, worker = story.task, story.worker()
    others = [named(w) for w in story.live if w.row.id != task.worker]
    nobody = f", and no other worker runs. Start one: `{START_COMMAND}`"
    if worker is None or worker.row.id in story.facts.dead:
        who = f"Its worker {named(worker)} (pid {worker.row.pid}) is dead" if worker \
            else f"Its worker, number {task.worker}, is gone"
        after = f"; {others[0]} takes it over within 2 s." if others else nobody
        yield Found("worker_dead", who + after)
        return
    timeout, silent = story.facts.worker_timeout, story.silence(worker)
    if silent >= timeout * 2 / 3:
        after = "; another worker takes it over now." if others and silent >= timeout \
            else f"; after {lasting(timeout)} its tasks go to others." if others \
            else nobody
        yield Found("worker_silent", f"Its worker {named(worker)} has not been heard "
                     f"of for {lasting(silent)}{after}")


def _in_pipe(story, run):
    what = ""
    if run.behind:
        what = f" behind task {run.behind}"
        if whole(run.behind_at):
            what += f", which has been running for {story.clock.since(run.behind_at)}"
    worker = story.worker()
    return Found("in_pipe", f"{named(worker)} has claimed it; it waits in a child"
                  f"{what}.")


def _began(story):
    run = story.facts.run
    return whole(run and run.began_at) or whole(story.task.started_at)


def _over_limit(story):
    began, limit = _began(story), story.task.timeout
    if not limit:
        limit = whole(story.worker().row.timeout)
    over = (story.now - began) / 1000 - limit if began and limit else 0
    if over > 0:
        yield Found("over_limit", f"It is {lasting(over)} past its limit of "
                     f"{lasting(limit)}, and is being ended.")


def _runs(story):
    began, facts = _began(story), story.facts
    say = f"It has been running on {named(story.worker())}"
    say += f" for {story.clock.since(began)}" if began else ""
    half, most = quantile(facts.ran, 0.5), quantile(facts.ran, 0.95)
    if half is not None and most is not None:
        say += f" (half of its runs end within {lasting(half)}, 95 % within " \
            f"{lasting(most)})"
    done, text = [*(facts.progress or ()), None, None][:2]
    said = [f"{done:.3g} %"] if whole(done) is not None else []
    said += [f"“{brief(text)}”"] if text else []
    return Found("running", f"{say}{': ' * bool(said)}{', '.join(said)}.")


# == Why ======================================================================
# Owns what holds a task that waits, and explain(), which is pure; why() asks a store
# first.  Whatever the rows hold, be it edited by hand: there is one sentence, and no
# exception.

_REPORT_AFTER = 5.0         # seconds in which a task that nothing holds should start
_STARVED_AFTER = 300.0      # … and for which one waits before it is called starved


# What waits.  Every blocker is found; the first is the sentence.


def _waiting(story):
    task = story.task
    if task.state != QUEUED and task.run_at > story.now:
        later = _retry_later if task.state == RETRYING else _due_later
        return [later(story), *_lasting_blockers(story)]
    found = [*_lasting_blockers(story), *_passing_blockers(story)]
    return found or [_ahead(story)]


def _until(story):
    at = whole(story.task.run_at)
    return f"{story.clock.at(at)}, in {lasting((at - story.now) / 1000)}"


def _due_later(story):
    task = story.task
    tick = f" (a tick of the schedule {brief(task.name)})" if task.tick else ""
    return Found("due_later", f"It waits for its time: {_until(story)}{tick}.",
                  whole(task.run_at))


def _retry_later(story):
    task, ended = story.task, None
    if whole(task.started_at) and whole(task.duration) is not None:
        ended = task.started_at + task.duration * 1000
    pause = f", and the pause before run {story.used + 1} is " \
        f"{lasting((task.run_at - ended) / 1000)}" if ended else ""
    return Found(
        "retry_later", f"It waits for its next run at {_until(story)}: run "
        f"{story.used} of {task.retries + 1} {end_of(story.facts.error)}{pause}.",
        whole(task.run_at))


def _lasting_blockers(story):
    """What will still be so when its time comes, unless somebody does something."""
    task, pause = story.task, story.facts.pause
    if not story.live:
        yield Found("no_worker", _no_worker(story))
    yield from _troubled(story, "database", True)
    if pause:
        at, by = whole(pause.at), f" by {brief(pause.by)}" if pause.by else ""
        since = f" since {story.clock.at(at)}" if at else ""
        reason = f" (“{brief(pause.reason)}”)" if pause.reason else ""
        yield Found("paused", f"Queue {brief(task.queue)} has been paused{since}{by}"
                     f"{reason}: `resume {brief(task.queue)}` lets it go on.")
    if story.live and not story.serving:
        yield Found("not_served", f"No live worker serves queue {brief(task.queue)}: "
                     f"{listed([_serving(w) for w in story.live])}.")
    if story.serving and not story.knowing:
        yield Found("unknown_name", _unknown_name(story))
    yield from _troubled(story, "broken", False)


def _no_worker(story):
    workers, left = story.facts.workers, story.facts.left
    last, clock = "", story.clock
    if workers:
        worker = max(workers, key=lambda w: w.row.beat_at)
        is_dead = worker.row.id in story.facts.dead
        last = f"; the last one, {named(worker)} (pid {worker.row.pid}), " + (
            "is dead" if is_dead else
            f"has not been heard of for {lasting(story.silence(worker))}")
    elif left:
        last = f"; the last one, {brief(left.who)}, left at {clock.at(left.at)}"
    return f"No worker runs on this database{last}. Start one: `{START_COMMAND}`"


def _serving(worker):
    return f"{named(worker)} serves {listed(list(map(brief, queues_of(worker) or ())))}"


def _unknown_name(story):
    import difflib

    name, facts = story.task.name, story.facts
    where = "" if len(story.serving) == len(story.live) else \
        f" that serves queue {brief(story.task.queue)}"
    say = f"No live worker{where} knows {brief(name)}"
    elsewhere = [w for w in story.live if w.names and name in w.names]
    if elsewhere:
        return f"{say}: {_serving(elsewhere[0])}, and knows it."
    near = difflib.get_close_matches(name, list(map(str, facts.names)), n=1, cutoff=0.6)
    if near:
        return f"{say} (did you mean {brief(near[0])}?)."
    if whole(facts.last_run):
        return f"{say}: it last ran at {story.clock.at(facts.last_run)}, on a worker " \
            "that is gone; was the program deployed without it?"
    return f"{say}."


def _troubled(story, code, is_database):
    """The first that has a note of this kind, where no worker can take it."""
    noted = [w for w in story.knowing
             if w.row.note and has_database_trouble(w) == is_database]
    if noted and not story.able:
        yield Found(code, f"{named(noted[0])} {brief(noted[0].row.note)}.")


def _passing_blockers(story):
    """What ends by itself."""
    task, clock = story.task, story.clock
    for state in ("starting", "stopping"):
        found = [w for w in story.knowing if w.row.state == state]
        if found and not story.able:
            who = named(found[0])
            if len(story.knowing) == 1 < len(story.live):
                who = f"The only worker that knows it, {who},"
            say = f"has been starting for {clock.since(found[0].row.started_at)}" \
                if state == "starting" else "is stopping, and claims nothing more"
            yield Found(state, f"{who} {say}.")
    if not story.knowing:
        return
    yield from _limited(story)
    if task.state != QUEUED:
        yield _promotion(story)
    elif story.facts.alone and not any(w.running == 0 for w in story.able):
        yield Found("alone", "Its last run died among others, so this one is to have a "
                     "child to itself: it waits until one has nothing to do.")


def _promotion(story):
    since, facts = story.clock.since(story.task.run_at), story.facts
    others = f", with {counted(facts.due - 1, 'other')}" if facts.due > 1 else ""
    return Found("promotion", f"It has been due for {since}{others}; each turn of a "
                  f"worker makes {facts.batch:,} of them ready.")


def _limited(story):
    """Limits of starts, and of runs at a time."""
    facts, name, now = story.facts, story.task.name, story.now
    before = sum(group.tasks for group in facts.ahead if group.name == name)
    rates = (
        (name, f"{brief(name)} may", [w.name_rate for w in story.knowing], before),
        ("", "All tasks together may", [w.row.rate for w in story.knowing],
         sum(group.tasks for group in facts.ahead)),
    )
    for limit, who, found, ahead in rates:
        rate, tat = max(filter(_is_rate, found), default=0), facts.tats.get(limit)
        if not rate or not _is_rate(tat) or rate_tokens(tat, now, rate) > 0:
            continue
        at = rate_next_at(tat, now, rate) + round(ahead * 1000 / rate)
        are = "is" if ahead == 1 else "are"
        others = f"; {ahead:,} {are} before it" if ahead else ""
        yield Found("rate", f"{who} start {per_time(rate)}{others}, so its turn is at "
                     f"about {story.clock.at(at)}.", at)
    most = max((whole(w.max_running, 0) for w in story.knowing), default=0)
    if 0 < most <= facts.running:
        others = f"; {before:,} {'is' if before == 1 else 'are'} before it" \
            if before else ""
        yield Found("max_running", f"{brief(name)} may run {most:,} at a time over all "
                     f"workers, and {facts.running:,} "
                     f"{'is' if facts.running == 1 else 'are'} running{others}.")


def _is_rate(value):
    return isinstance(value, (int, float)) and 1e-9 <= value < 1e16


def _ahead(story):
    """Others, full children; or nothing at all."""
    facts, task, workers = story.facts, story.task, story.able
    ahead = [group for group in facts.ahead if any(
        serves(w, group.queue) and knows(w, group.name) for w in workers)]
    count = sum(group.tasks for group in ahead)
    children = sum(whole(w.row.concurrency, 0) for w in workers)
    is_full = sum(w.running for w in workers) >= children
    ended = sum(p.runs for p in facts.pace if any(
        serves(w, p.queue) for w in workers))
    since = min((p.since for p in facts.pace), default=story.now)
    pace = ended / max(1.0, (story.now - since) / 1000)
    waited = (story.now - max(task.run_at, task.created_at)) / 1000
    if not (count or is_full):
        return _next(story, waited)
    lowest = {group.priority for group in ahead}
    if count and pace and max(lowest) < task.priority and waited >= _STARVED_AFTER \
            and _comes(story) >= pace:
        which = " to ".join(map(str, sorted({min(lowest), max(lowest)})))
        return Found("starved", f"Tasks of priority {which} come as fast as they are "
                      "done: at this pace it never runs.")
    return _busy(story, workers, count, children if is_full else 0, pace)


def _comes(story):
    """How many a second come of those that are before it."""
    since = whole(story.facts.recent_since)
    if since is None:
        return 0.0
    return story.facts.recent / max(1.0, (story.now - since) / 1000)


def _busy(story, workers, count, children, pace):
    who = f"{named(workers[0])}" if len(workers) == 1 else f"{len(workers):,} workers"
    full = "" if not children else f"The only child of {who} is busy" \
        if children == 1 else f"All {children:,} children of {who} are busy"
    more = "more than " * story.facts.is_more
    are = "is" if count == 1 else "are"
    tasks = f"{more}{counted(count, 'task')} {are} ahead of it" if count \
        else "it is the next one"
    say = f"{full} and {tasks}" if full else tasks[0].upper() + tasks[1:]
    if not (count and pace):
        return Found("busy", say + ".")
    seconds = count / pace
    speed = f"{pace:,.0f} a second" if pace >= 10 else per_time(float(f"{pace:.2g}"))
    return Found("busy", f"{say}: about {lasting(seconds)} at the present {speed}.",
                  story.now + round(seconds * 1000))


def _next(story, waited):
    """Nothing holds it.  That is no trouble while something has changed just now."""
    changes = [whole(at, 0) for w in story.able
               for at in (w.row.started_at, w.claimed_at)]
    still = min(waited, (story.now - max(changes, default=0)) / 1000)
    if still < _REPORT_AFTER or any(whole(w.row.running, 0) for w in story.able):
        return Found("next", "It is about to start.")
    return Found("next", "Nothing holds it, yet it has not started for "
                  f"{lasting(still)}: please report `why {story.task.id} --json`.")


def _numbers(story):
    """The facts as JSON has them: numbers and names, no rows."""
    facts, task = story.facts, story.task
    found = {
        "id": facts.id, "status": task and state_name(task.state),
        "now": iso_time(facts.now), "last_id": facts.last_id,
        "workers": [_worker_numbers(story, w) for w in facts.workers[:20]],
    }
    if task is None:
        return found
    found.update(
        name=task.name, queue=task.queue, priority=task.priority, attempt=task.attempt,
        forgiven=task.forgiven, retries=task.retries, timeout=task.timeout,
        run_at=iso_time(whole(task.run_at, 0)), worker=task.worker)
    if task.state in WAITING:
        found.update(
            ahead=sum(group.tasks for group in facts.ahead), is_more=facts.is_more,
            due=facts.due, running=facts.running, alone=facts.alone,
            recent=facts.recent, tats=dict(facts.tats),
            pace=[dict(p._asdict()) for p in facts.pace[:20]],
            paused=facts.pause is not None)
    elif task.state == RUNNING:
        found.update(p50=quantile(facts.ran, 0.5), p95=quantile(facts.ran, 0.95),
                     progress=facts.progress, holds=facts.run and facts.run._asdict())
    return found


def _worker_numbers(story, worker):
    return {
        "id": worker.row.id, "name": worker.row.name, "pid": worker.row.pid,
        "live": worker in story.live, "silent": story.silence(worker),
        "running": worker.running, "children": worker.row.concurrency,
        "queues": queues_of(worker), "state": worker.row.state, "note": worker.row.note,
        "knows": None if worker.names is None or not story.task
        else story.task.name in worker.names,
    }


def explain(facts: TaskFacts) -> Reason:
    """Why a task is as it is.  Pure, and it always finds a reason."""
    story = Story(facts)
    if facts.task is None:
        found = [absent(story)]
    elif facts.task.state in FINISHED:
        found = [ENDS[facts.task.state](story), *held_key(story)]
    elif facts.task.state == RUNNING:
        found = at_work(story)
    elif facts.task.state in WAITING:
        found = _waiting(story)
    else:
        found = [Found("unknown_state", "It is in a state that there is not, "
                        f"{facts.task.state}: its row was edited by hand.")]
    (code, say, until), *others = found
    also = tuple((other.code, other.say) for other in others)
    return Reason(code, say, also, until, _numbers(story))


def dead_of(store: Store, workers: Sequence[WorkerFacts]) -> frozenset:
    """The ids of those that the kernel knows to be dead."""
    is_dead = judge_of(store)
    return frozenset(worker.row.id for worker in workers if is_dead(worker.row))


def why(store: Store, task_id: int, now: int,
        settings: types.SimpleNamespace | None = None) -> Reason:
    """Why a task is as it is just now.  Raises DatabaseUnavailable.

    `settings` tell how long a worker may be silent, and how long tasks are kept.
    """
    facts = store.task_facts(task_id, now)
    facts = facts._replace(dead=dead_of(store, facts.workers))
    if settings is not None:
        facts = facts._replace(worker_timeout=settings.worker_timeout,
                               retention=settings.retention)
    return explain(facts)


# == Attention ================================================================
# Owns the list of what needs somebody, and the commands `why` and `show`.  Without an
# entry here nothing has to be done now.  alerts() is pure; attention() asks a store
# and its disk first.

# The README has this table; they are looked for, and listed, in this order.
ALERTS = {
    "no_worker": "no worker runs, and something is to be done",
    "trouble": "a worker has trouble with the database, or cannot start children",
    "worker_dead": "a worker is dead or gone, and still holds tasks",
    "worker_silent": "a worker that holds tasks is not heard of",
    "paused": "a queue is paused, and tasks wait in it",
    "unknown_name": "tasks wait that no worker which serves their queue knows",
    "not_served": "tasks wait in a queue that no worker serves",
    "late": "the oldest task of a queue has waited for over a minute, and ten times as "
            "long as 95 % did in the last day",
    "failing": "of the runs of a task in the last ten minutes over 20 % failed, 5 at "
               "least",
    "crashing": "runs of a task crashed in the last hour, or ran out of memory",
    "schedule_late": "a tick is over a minute late",
    "schedule_unseen": "no worker that runs knows a schedule any more",
    "schedule_failed": "the last run of a schedule failed",
    "schedule_silent": "a schedule has had no success for longer than its alert_after",
    "memory": "a child holds over 90 % of its max_memory",
    "long_run": "a run without a time limit takes over a minute, and ten times as long "
                "as 95 % did in the last day",
    "disk": "the disk of the database is nearly full: under 1 GiB, or under 5 %",
    "wal": "the write-ahead log is over 256 MiB: somebody reads for too long",
    "clock": "the clock went back, or leapt forward by over an hour",
}
_MOST_ALERTS, _MOST_OF_ONE = 8, 3
_LONG_SECONDS = 60.0            # that a task waits, or runs, without a word
_TIMES_USUAL = 10               # … and so many times as long as 95 % did
_FAILED_PART, _FAILED_RUNS = 0.2, 5
_MEMORY_PART = 0.9
_DISK_BYTES, _DISK_PART = 1 << 30, 0.05
_WAL_BYTES = 256 << 20


class Alert(NamedTuple):
    """Something that needs somebody."""

    code: str               # one of ALERTS
    level: str              # bad: work does not get done; warn: it soon may not
    say: str                # one sentence
    target: str             # what it is about: queue/NAME, worker/NAME, task/ID …
    action: str             # what helps: resume, start, look, retry, cancel, free


class Disk(NamedTuple):
    """Bytes of the file system that the database is on, and of its log."""

    free: int
    total: int              # 0: unknown
    wal: int


class _System:
    """What the facts about all come to."""

    def __init__(self, facts: SystemFacts, disk: Disk, worker_timeout: float):
        self.facts, self.disk, self.now = facts, disk, facts.now
        self.timeout = worker_timeout
        self.dead = facts.dead
        self.live = [w for w in facts.workers if w.row.id not in facts.dead
                     and silence(w, facts.now) < worker_timeout]
        self.paused = {pause.queue for pause in facts.pauses}

    @property
    def clock(self):
        """A new one for each sentence: each says its zone."""
        return Clock(self.now)

    def name_of(self, worker):
        """The name of a worker's row, or its number."""
        return next((named(w) for w in self.facts.workers if w.row.id == worker),
                    f"worker {worker}")

    def heads(self):
        """The first ready tasks of queues that are not paused."""
        return [head for head in self.facts.heads if head.queue not in self.paused]

    def oldest(self, queue, name=None):
        """Seconds that the oldest ready task there has waited."""
        waits = [self.now - head.run_at for head in self.facts.heads
                 if head.queue == queue and name in (None, head.name)]
        return max(0, *waits, 0) / 1000


def alerts(facts: SystemFacts, disk: Disk, worker_timeout: float = 15.0) -> list[Alert]:
    """What needs somebody, the worst first; at most 8, and then 3 of a kind."""
    system = _System(facts, disk, worker_timeout)
    found = [alert for look in _LOOKS for alert in look(system)]
    if len(found) > _MOST_ALERTS:
        count: collections.Counter = collections.Counter()
        for alert in found[:]:
            count[alert.code] += 1
            if count[alert.code] > _MOST_OF_ONE:
                found.remove(alert)
    return found[:_MOST_ALERTS]


def _nobody(system):
    facts = system.facts
    if facts.has_work and not system.live:
        last = ""
        if facts.left and not facts.workers:
            last = f"; the last one, {brief(facts.left.who)}, left at " \
                f"{system.clock.at(facts.left.at)}"
        yield Alert("no_worker", "bad", f"No worker runs on this database{last}.",
                    "workers", "start")


def _trouble(system):
    for worker in system.live:
        if worker.row.note:
            yield Alert("trouble", "bad", f"{named(worker)} {brief(worker.row.note)}.",
                        f"worker/{worker.row.name}", "look")


def _lost(system):
    facts = system.facts
    helper = ": no other worker runs to take them over"
    helper, level = ("", "warn") if system.live else (helper, "bad")
    for worker in facts.workers:
        if worker.row.id in system.dead and worker.running:
            tasks = counted(worker.running, "task")
            yield Alert("worker_dead", level, f"{named(worker)} (pid {worker.row.pid}) "
                        f"is dead, and still holds {tasks}{helper}.",
                        f"worker/{worker.row.name}", "look" if system.live else "start")
    for number, count in facts.gone:
        yield Alert("worker_dead", level, f"Worker {number} is gone, and still holds "
                    f"{counted(count, 'task')}{helper}.", "workers",
                    "look" if system.live else "start")
    for worker in facts.workers:
        silent = silence(worker, system.now)
        if worker.row.id not in system.dead and worker.running \
                and silent >= system.timeout * 2 / 3:
            yield Alert("worker_silent", level, f"{named(worker)} has not been heard "
                        f"of for {lasting(silent)}, and holds "
                        f"{counted(worker.running, 'task')}.",
                        f"worker/{worker.row.name}", "look")


def _paused(system):
    for queue, at, by, reason, waiting in system.facts.pauses:
        if waiting:
            by = f" by {brief(by)}" if by else ""
            reason = f" (“{brief(reason)}”)" if reason else ""
            since = f" since {system.clock.at(at)}" if whole(at) else ""
            wait = "waits" if waiting == 1 else "wait"
            oldest = lasting(system.oldest(queue))
            yield Alert("paused", "bad", f"Queue {brief(queue)} has been paused{since}"
                        f"{by}{reason}: {counted(waiting, 'task')} {wait}, the oldest "
                        f"for {oldest}.", f"queue/{queue}", "resume")


def _unserved(system):
    """Names that nobody knows, and queues that nobody serves."""
    said = set()
    for head in system.heads() if system.live else ():
        serving = [w for w in system.live if serves(w, head.queue)]
        if not serving and head.queue not in said:
            said.add(head.queue)
            yield Alert("not_served", "bad", f"No live worker serves queue "
                        f"{brief(head.queue)}: its oldest task has waited for "
                        f"{lasting(system.oldest(head.queue))}.",
                        f"queue/{head.queue}", "start")
        elif serving and (head.queue, head.name) not in said \
                and not any(knows(w, head.name) for w in serving):
            said.add((head.queue, head.name))
            waited = lasting(system.oldest(head.queue, head.name))
            yield Alert("unknown_name", "bad", f"No live worker that serves queue "
                        f"{brief(head.queue)} knows {brief(head.name)}: the oldest "
                        f"such task has waited for {waited}.",
                        f"tasks?state=queued&name={_quoted(head.name)}", "look")


def _quoted(text):
    from urllib.parse import quote

    return quote(str(text), safe="")


def _late(system):
    known = collections.defaultdict(list)
    for head in system.heads():
        if any(serves(w, head.queue) and knows(w, head.name) for w in system.live):
            known[head.queue].append((system.now - head.run_at) / 1000)
    for queue, waits in sorted(known.items()):
        usual = quantile(system.facts.waits.get(queue, ()), 0.95) or 0.0
        if max(waits) > max(_LONG_SECONDS, _TIMES_USUAL * usual):
            than = f"; 95 % waited less than {lasting(usual)} in the last day" \
                if usual else ""
            yield Alert("late", "bad", f"The oldest task of queue {brief(queue)} has "
                        f"waited for {lasting(max(waits))}{than}.", f"queue/{queue}",
                        "look")


def _failing(system):
    for name, runs, bad, _, error in system.facts.recent:
        runs = max(runs, bad)
        if bad >= _FAILED_RUNS and bad > _FAILED_PART * runs:
            mostly = f"; most often it {end_of(error)}" if error else ""
            yield Alert("failing", "bad", f"{brief(name)} fails: {percent(bad / runs)} "
                        f"of {counted(runs, 'run')} in the last 10 min{mostly}.",
                        f"failures?name={_quoted(name)}", "look")


def _crashing(system):
    for name, _, _, crashed, error in system.facts.recent:
        if crashed:
            is_crash = error and error["kind"] == "crash" and error.get("message")
            how = f": {brief(error['message'])}" if is_crash else ""
            times = "once" if crashed == 1 else f"{crashed:,} times"
            yield Alert("crashing", "bad", f"{brief(name)} crashed {times} in the last "
                        f"hour{how}.", f"failures?name={_quoted(name)}", "look")


def _schedules(system):
    for known in system.facts.schedules:
        for code, say, action in _about(system, known):
            yield Alert(code, "bad", f"Schedule {brief(known.row.name)} {say}.",
                        "schedules", action)


def _about(system, known):
    row, now, clock = known.row, system.now, system.clock
    late = now / 1000 - row.next_tick if row.next_tick is not None else 0
    unseen = bool(system.live) and all(
        row.seen_at < w.row.started_at for w in system.live)
    if unseen:
        yield ("schedule_unseen", "is known to no live worker: one saw it last at "
               f"{clock.at(row.seen_at)}", "forget")
    elif system.live and late > _LONG_SECONDS:
        yield ("schedule_late", f"is late: its tick of "
               f"{clock.at(row.next_tick * 1000)} has not been enqueued", "look")
    if known.last_state == FAILED:
        yield "schedule_failed", f"failed: its last run was task {row.last_id}", "look"
    after, success = whole(row.alert_after), whole(row.success_at)
    plain = row._replace(
        expr=str(row.expr), tz=str(row.tz), alert_after=after and row.alert_after,
        success_at=success, since=whole(row.since))
    if late_tick(plain, now) is not None:
        last = f"since {clock.at(success)}" if success else "yet"
        yield "schedule_silent", f"has had no success {last}", "look"


def _large_children(system):
    limits = {w.row.id: whole(w.row.max_memory, 0) for w in system.live}
    for worker, pid, memory in system.facts.children:
        limit, memory = limits.get(worker, 0), whole(memory, 0)
        if limit and memory > _MEMORY_PART * limit:
            name = system.name_of(worker)
            yield Alert("memory", "warn", f"A child of {name} (pid {pid}) holds "
                        f"{memory >> 20:,} MiB, {percent(memory / limit)} of its "
                        "max_memory.", f"worker/{name}", "look")


def _long_runs(system):
    limits = {w.row.id: w.row.timeout for w in system.facts.workers}
    for run in system.facts.long:
        began, usual = whole(run.began_at), quantile(run.ran, 0.95)
        ran = (system.now - began) / 1000 if began else 0
        if ran > _LONG_SECONDS and usual is not None and ran > _TIMES_USUAL * usual \
                and limits.get(run.worker, 1) is None:
            yield Alert("long_run", "warn", f"Task {run.task}, {brief(run.name)}, has "
                        f"been running for {lasting(ran)} and has no time limit; 95 % "
                        f"of its runs end within {lasting(usual)}.", f"task/{run.task}",
                        "cancel")


def _disk(system):
    free, total, wal = system.disk
    if total and (free < _DISK_BYTES or free < _DISK_PART * total):
        yield Alert("disk", "bad", f"The disk of the database has {free >> 20:,} MiB "
                    f"left, {percent(free / total)} of it.", "", "free")
    if wal > _WAL_BYTES:
        yield Alert("wal", "warn", f"The write-ahead log has grown to {wal >> 20:,} "
                    "MiB: some program has been reading for too long.", "", "look")


def _clock(system):
    view, now = system.facts.clock, system.now
    beats = [w.row.beat_at for w in system.live]
    seen = max([*beats, whole(view and view.seen, 0)], default=0)
    if seen > now + AHEAD_MS:
        yield Alert("clock", "warn", f"The clock went back by "
                    f"{lasting((seen - now) / 1000)}.", "", "look")
    elif view and view.doubted is not None:
        leap = lasting((view.doubted - view.seen) / 1000)
        yield Alert("clock", "warn", f"The clock leapt forward by {leap}: no old task "
                    "is deleted until that is certain.", "", "look")


_LOOKS = (_nobody, _trouble, _lost, _paused, _unserved, _late, _failing, _crashing,
          _schedules, _large_children, _long_runs, _disk, _clock)


def disk_of(path: str) -> Disk:
    """What is left where a file is.  Never raises: then it is not known."""
    free = total = wal = 0
    with contextlib.suppress(OSError, AttributeError):  # none on Windows
        found = os.statvfs(path)
        free, total = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    with contextlib.suppress(OSError):
        wal = os.stat(path + "-wal").st_size
    return Disk(free, total, wal)


def attention(store: Store, now: int, settings: types.SimpleNamespace) -> list[Alert]:
    """What needs somebody just now.  Raises DatabaseUnavailable, and nothing else."""
    facts = store.system_facts(now)
    facts = facts._replace(dead=dead_of(store, facts.workers))
    return alerts(facts, disk_of(store.path), settings.worker_timeout)


def _plain_value(value):
    """What JSON can have, of what a row holds."""
    if isinstance(value, dict):
        return {str(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else repr(value)


def reason_report(reason: Reason) -> dict:
    """A reason as --json prints it."""
    until = None if reason.until is None else iso_time(reason.until)
    return {
        "id": reason.facts["id"], "status": reason.facts["status"],
        "code": reason.code, "say": reason.say,
        "also": [{"code": code, "say": say} for code, say in reason.also],
        "until": until, "facts": _plain_value(reason.facts),
    }


def reason_text(reason: Reason) -> str:
    """The sentence, and what else there is to say, on lines of their own."""
    also = "Then" if reason.code in ("due_later", "retry_later") else "Also"
    lines = [reason.say, *(f"{also}: {say}" for _, say in reason.also)]
    return visible("\n".join(lines))


def attention_text(found: Sequence[Alert]) -> str:
    """A line for each, or that there is none."""
    marks = {"bad": "×", "warn": "!"}
    lines = [f"{marks[alert.level]} {alert.say}" for alert in found]
    return visible("\n".join(lines)) or "Nothing needs you."


def _as_json(report):
    return json.dumps(report, indent=2, default=repr)


@command("why", "say why a task is as it is, or what needs you", "why 42",
         flag("id", metavar="ID", nargs="?",
              help="a task (default: what needs you, of all there is)"), reads=True)
def _why(args, app):
    store, now = app.store, app.store.now()
    if args.id is None:
        found = attention(store, now, app.settings)
        return _as_json([alert._asdict() for alert in found]) if args.json \
            else attention_text(found)
    reason = why(store, parse_id(args.id), now, app.settings)
    if args.json:
        print_text(_as_json(reason_report(reason)))
    elif reason.code == "unknown_id":
        raise TaskNotFound(reason.say)
    else:
        print_text(reason_text(reason))
    return int(reason.code == "unknown_id")


@command("show", "show why a task is as it is, and all that is known of it", "show 42",
         flag("id", metavar="ID"), reads=True)
def _show(args, app):
    task_id = parse_id(args.id)
    report = show_report(app.store, task_id)
    reason = why(app.store, task_id, app.store.now(), app.settings)
    if args.json:
        return _as_json({**report, "why": reason_report(reason)})
    colour = is_terminal(sys.stdout) and "NO_COLOR" not in os.environ
    return f"{reason_text(reason)}\n{show_text(report, colour)}"


# == Logs =====================================================================
# Owns `logs`: what the runs of a task have printed, also while they go on.  Whatever
# else there is to say goes to standard error.

_GLANCE_SECONDS = 0.1             # between two looks whether something was committed
_REASON_SECONDS = 2.0           # … and two for the reason why nothing happens
_IS_FINE = ("running", "next")  # codes of why() of which nothing is to be said


class Follower:
    """Shows what the runs of one task print: each part once, in its order.

    `show(attempt, text)` prints, `note(text)` says something beside that.
    """

    def __init__(self, store: Store, task_id: int, attempt: int | None,
                 show: Callable[[int, str], Any], note: Callable[[str], Any]):
        self._store, self._id, self._show, self._note = store, task_id, show, note
        self._first = attempt           # that is to be shown; None: the newest
        self.attempt = 0                # that is shown now; 0: none has begun
        self._seen = 0                  # characters of it

    def look(self) -> TaskRow:
        """Show what is new; return the task.  Raises TaskNotFound."""
        row = self._store.task(self._id)
        if self.attempt > row.attempt:          # it was taken back: it had not begun
            self.attempt = self._seen = 0
        if not self.attempt and row.attempt:
            self.attempt = self._first or row.attempt
        while 0 < self.attempt <= row.attempt:
            self._show_parts(self._parts(row))
            if self.attempt == row.attempt:
                break
            self.attempt, self._seen = self.attempt + 1, 0
            self._note(f"run {self.attempt}:")
        return row

    def _parts(self, row):
        if row.state == RUNNING and self.attempt == row.attempt:
            rows = self._store.live_output(self._id, self.attempt)
            return [(part.seq, part.body) for part in rows]
        return parts_of(self._store.attempt_output(self._id, self.attempt) or "")

    def _show_parts(self, parts):
        for seq, text in parts:
            if seq + len(text) <= self._seen:
                continue
            cut, rest = max(0, seq - self._seen), text[max(0, self._seen - seq):]
            self._show(self.attempt, cut_mark(cut) + rest if cut else rest)
            self._seen = seq + len(text)


def follow(store: Store, follower: Follower, reason: Callable[[], Reason],
           note: Callable[[str], Any], pause: Callable = own_sleep) -> int:
    """Show until the task is finished; return its state.

    Says once of each reason that nothing happens.  Raises TaskNotFound for a task that
    is deleted meanwhile, or that another database in place of this one has not.
    """
    version, said, due = None, "", 0.0
    while True:
        now = store.data_version()
        if now != version:
            version = now
            row = follower.look()
            if row.state in FINISHED:
                return row.state
        if time.monotonic() >= due:
            due, found = time.monotonic() + _REASON_SECONDS, reason()
            if found.code not in (said, *_IS_FINE) and found.code != "unknown_id":
                note(f"waiting: {found.say}")
            said = found.code
        pause(_GLANCE_SECONDS)


def _write(text, is_raw):
    """Print a part as it is, but for what a terminal would obey; at once."""
    if sys.stdout is None:
        raise Problem("standard output is closed")
    encoding = sys.stdout.encoding or "ascii"
    text = text if is_raw else visible(text)
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _say(text):
    print(f"pybgworker: {visible(text)}", file=sys.stderr, flush=True)


class _Screen:
    """Where the parts go: text, or with `is_json` an object a line."""

    def __init__(self, is_raw: bool, is_json: bool):
        self._is_raw, self._is_json = is_raw, is_json
        self._last = "\n"

    def show(self, attempt: int, text: str) -> None:
        """Print a part."""
        if self._is_json:
            return self.line(attempt=attempt, text=text)
        _write(text, self._is_raw)
        self._last = text[-1:] or self._last

    def line(self, **fields: Any) -> None:
        """An object on a line of its own, if that is wanted."""
        if self._is_json:
            _write(f"{json.dumps(fields)}\n", True)

    def note(self, text: str) -> None:
        """Say something beside it."""
        self.end()
        _say(text)

    def end(self) -> None:
        """End a line that has not ended; but nothing is added to what is raw."""
        if self._last != "\n" and not self._is_raw:
            _write("\n", True)
        self._last = "\n"


@command("logs", "show what a task has printed", "logs 42 -f",
         flag("id", metavar="ID"),
         flag("-f", "--follow", action="store_true",
              help="show what it prints from now on, until it is finished; exit status "
              "0 if it succeeded, else 1"),
         flag("--attempt", metavar="N", type=typed(parse_count), default=None,
              help="the run to show, or to begin with (default: the newest)"),
         flag("--raw", action="store_true",
              help="print control characters as they are, not as \\x1b"), reads=True)
def _logs(args, app):
    task_id, store = parse_id(args.id), app.store
    row = store.task(task_id)
    if args.attempt and args.attempt > max(1, row.attempt):
        raise Problem(f"task {task_id} has had {counted(row.attempt, 'run')} so far")

    def reason():
        return why(store, task_id, store.now(), app.settings)

    if not args.follow:
        return _show_one(store, row, args, reason)
    screen = _Screen(args.raw, args.json)
    follower = Follower(store, task_id, args.attempt, screen.show, screen.note)
    state = follow(store, follower, reason, screen.note)
    screen.end()
    screen.line(status=state_name(state))
    return int(state != SUCCESS)


def _show_one(store, row, args, reason):
    """What one run has printed so far."""
    if not row.attempt:
        raise Problem(f"task {row.id} has not run yet: {reason().say}")
    parts: list[str] = []
    attempt, is_running = args.attempt or row.attempt, row.state == RUNNING
    own = Follower(store, row.id, attempt, lambda n, text: parts.append(text)
                   if n == attempt else None, nobody)
    own.look()
    text = "".join(parts)
    if args.json:
        return json.dumps({
            "id": row.id, "status": row.status, "attempt": attempt, "output": text,
            "running": is_running and attempt == row.attempt}, indent=2)
    if not text:
        _say(f"nothing is kept of what run {attempt} of task {row.id} has printed")
    screen = _Screen(args.raw, False)
    screen.show(attempt, text)
    screen.end()
    return 0


# == Overview =================================================================
# Owns what is to be seen of a whole queue at a glance, and the tables behind it:
# plain dicts, which `top` and the web draw and programs read.  Times are ISO 8601
# in UTC; durations and ages are seconds; `share` and `cpu` are parts of one: 1.04 is
# 104 %.  Only looks, and reads nothing that grows with what has finished.

_SHOWN = {"running": 20, "failures": 8, "next": 5}      # rows of an overview
_BARS = 15                      # minutes for which a queue's pace is drawn
_RECENT = 10                    # minutes that the figures look back
_POINTS = {"hour": (MINUTE, 60), "day": (QUARTER, 96)}    # … and how many
_MOST_FAILURES = 1000           # the newest, that are grouped
_SLOW_PACE = 10                 # a minute; below it one minute says too little
_GROWS = 1.1                    # as much comes in as goes out, and a tenth more


class Beats:
    """What share of a CPU processes use, told from two heartbeats of each.

    One beat tells only what they have used in all.  Kept from look to look.
    """

    def __init__(self) -> None:
        self._last: dict = {}       # key: (time of the beat, seconds used, share)

    def share(self, key: Any, beat_at: int, used: float | None) -> float | None:
        """Of the time between the two newest beats; None before the second."""
        if used is None:
            return None
        at, before, share = self._last.get(key, (beat_at, used, None))
        if beat_at > at:
            share = max(0.0, used - before) * 1000 / (beat_at - at)
        self._last[key] = beat_at, used, share
        return share

    def keep(self, keys: Iterable) -> None:
        """Forget all others: they have ended."""
        self._last = {key: self._last[key] for key in keys if key in self._last}


def _iso_of(at):
    return None if at is None else iso_time(at)


def _second(at):
    """A time of the history, which is in whole seconds, as the others are shown."""
    return iso_time(at * 1000)


def _age(at, now):
    return None if at is None else max(0, now - at) / 1000


def _ended_badly(row):
    """Runs that ended badly, whether another one follows or not."""
    return row.exceptions + row.crashed + row.timeouts + row.lost + row.aborted


def _finished(row):
    """Runs after which their task was finished."""
    return row.runs - row.retried


def _by(key, rows):
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _rate(by_minute, now):
    """A minute's worth of what was counted by minutes, up to now.

    As the last one is not over, it takes from the one before what is missing.
    """
    at, passed = now // 60_000 * MINUTE, now % 60_000 / 60_000
    return by_minute.get(at, 0) + by_minute.get(at - MINUTE, 0) * (1 - passed)


def overview(store: Store, settings: types.SimpleNamespace, now: int,
             span: str = "hour", beats: Beats | None = None) -> dict:
    """All at a glance: what needs somebody, figures, queues, what runs, what failed.

    `span` is that of the series, hour or day.  With the same `beats` at each look
    the CPU that processes use is known; without, that of workers since they began.
    """
    minutes = _last_hour(store, now)
    queues = _queues(store, now, minutes)
    workers = workers_report(store, settings, now, beats)
    step, _ = _POINTS[span]
    running, running_total = _running(store, now, workers)
    failures = failures_report(store, now)
    for row in workers:
        del row["processes"]
    return {
        "at": iso_time(now), "database": store.path, "span": span, "step": step,
        "attention": [alert._asdict() for alert in attention(store, now, settings)],
        "figures": _figures(store, now, minutes, queues, workers),
        "series": _series(store, now, span, minutes),
        "queues": queues, "running": running, "running_total": running_total,
        "failures": failures["groups"][:_SHOWN["failures"]],
        "failures_groups": len(failures["groups"]),
        "failures_total": failures["total"], "failures_capped": failures["capped"],
        "workers": workers, "next": schedules_report(store, now, _SHOWN["next"]),
    }


def _last_hour(store, now):
    """A row for each queue and minute, from the same minute of the hour before on."""
    return store.history(MINUTE, now - HOUR_MS, now + 1, by="queue")


def _figures(store, now, minutes, queues, workers):
    recent = merged([row for row in minutes
                     if row.at > now // 1000 - (_RECENT + 1) * MINUTE])
    by_minute: dict = collections.Counter()
    for row in minutes:
        by_minute[row.at] += row.runs
    alive = [row for row in workers if row["state"] not in ("dead", "stale")]
    ticks = [at for row in queues for at in [row.pop("next_at")] if at is not None]
    bad = _ended_badly(recent)
    return {
        "runs_per_minute": round(_rate(by_minute, now)),
        "runs": recent.runs, "failed": bad,
        "failed_share": bad / recent.runs if recent.runs else None,
        "waiting": sum(row["waiting"] for row in queues),
        "oldest": max((row["oldest"] for row in queues if row["oldest"] is not None),
                      default=None),
        "later": sum(row["later"] for row in queues),
        "next_in": max(0, min(ticks) - now) / 1000 if ticks else None,
        "busy": sum(row["busy"] for row in alive),
        "children": sum(row["children"] for row in alive), "workers": len(alive),
        "wait_p50": quantile(recent.waited, 0.5),
        "wait_p95": quantile(recent.waited, 0.95),
    }


def _series(store, now, span, minutes):
    """A point for each step of the span; the last one is not over."""
    step, count = _POINTS[span]
    last = now // 1000 // step * step
    first = last - count * step
    rows = minutes
    if span == "day":
        rows = store.history(step, first * 1000, now + 1, by="at")
    groups = _by(lambda row: row.at // step * step, rows)
    points = []
    for at in range(first, last + 1, step):
        all_ = merged(groups.get(at, []))
        bad = _ended_badly(all_)
        points.append({
            "t": _second(at), "ok": all_.runs - bad - all_.cancelled, "bad": bad,
            "p50": quantile(all_.waited, 0.5), "p95": quantile(all_.waited, 0.95),
        })
    return points


# Queues.  What comes in is counted among the newest tasks, for nothing keeps it;
# what goes out is history.

def queues_report(store: Store, now: int) -> list[dict]:
    """Each queue with unfinished tasks, that is paused, or has worked in this hour.

    `in_per_minute` counts the tasks of the last minute that may run at once, retries
    not among them; `out_per_minute` those that finished.  `empty_in` is how long what
    waits now takes at that pace: seconds, "paused", "never" where more comes in than
    goes out and more than a minute's worth waits, or None where nothing waits.
    `bars` are the finished of the last 15 minutes, `busiest` the most in one minute
    of this hour.
    """
    minutes = _last_hour(store, now)
    rows = _queues(store, now, minutes)
    for row in rows:
        del row["next_at"]
    return rows


def _queues(store, now, minutes):
    arrived = store.arrivals(now)
    paces: dict = {}
    for row in minutes:
        pace = paces.setdefault(row.queue, collections.Counter())
        pace[row.at] += _finished(row)
    found = {row.name: row for row in store.queues(now)}
    idle = QueueRow("", 0, 0, 0, 0, None, None, None, None, None)
    return [
        _queue_row(found.get(name, idle)._replace(name=name), now,
               arrived.get(name, 0), paces.get(name, {}))
        for name in sorted({*found, *paces})
    ]


def _queue_row(row, now, arrived, pace):
    last = now // 60_000 * MINUTE
    out = _rate(pace, now)
    bars = [pace.get(last - n * MINUTE, 0) for n in range(_BARS - 1, 0, -1)]
    bars.append(round(out))
    return {
        "queue": row.name, "waiting": row.queued, "oldest": _age(row.oldest_at, now),
        "later": row.scheduled + row.retrying, "next_at": row.next_at,
        "running": row.running, "in_per_minute": round(arrived),
        "out_per_minute": round(out), "empty_in": _empty_in(row, arrived, out, bars),
        "bars": bars, "busiest": max([*pace.values(), bars[-1]]),
        "paused": None if row.paused_at is None else {
            "since": _iso_of(row.paused_at), "by": row.paused_by, "reason": row.reason},
    }


def _empty_in(row, arrived, out, bars):
    if row.paused_at is not None:
        return "paused"
    if not row.queued:
        return None
    pace = out if out >= _SLOW_PACE else sum(bars) / _BARS
    if not pace or (arrived > pace * _GROWS and row.queued > arrived):
        return "never"
    return row.queued / pace * MINUTE


# What runs.

def workers_report(store: Store, settings: types.SimpleNamespace, now: int,
                   beats: Beats | None = None) -> list[dict]:
    """Each registered worker, with its children in `processes`.

    `state` is starting, ready, stopping; stale when it was not heard of for the
    worker timeout; dead when its machine says so.  `busy` counts children: as of now
    where each runs one task at a time, else as of the last heartbeat.
    """
    running, is_dead = store.running_counts(), judge_of(store)
    children = _by(lambda row: row.worker, store.children())
    beats = Beats() if beats is None else beats
    rows = store.workers()
    reports = [
        _worker_row(row, now, running.get(row.id, 0), children.get(row.id, []), beats)
        for row in rows
    ]
    for row, report in zip(rows, reports):
        if is_dead(row):
            report["state"] = "dead"
        elif report["beat_age"] > settings.worker_timeout:
            report["state"] = "stale"
    beats.keep([(row["id"], process["pid"]) for row in reports
                for process in [{"pid": 0}, *row["processes"]]])
    return reports


def _worker_row(row, now, claimed, children, beats):
    up = _age(row.started_at, now)
    used = None if row.cpu is None else row.cpu + (row.children_cpu or 0)
    cpu = beats.share((row.id, 0), row.beat_at, used)
    processes = [{
        "pid": child.pid, "running": child.running, "memory": child.memory,
        "cpu": beats.share((row.id, child.pid), row.beat_at, child.cpu),
    } for child in children]
    busy = sum(child.running > 0 for child in children)
    if all(child.running <= 1 for child in children):
        busy = min(row.concurrency, claimed)
    memory = None if row.memory is None else \
        row.memory + sum(child.memory for child in children)
    return {
        "id": row.id, "name": row.name, "pid": row.pid, "host": row.host,
        "version": row.version, "queues": _names_in(row.queues),
        "state": row.state, "note": row.note, "start_method": row.start_method or None,
        "busy": busy, "children": row.concurrency, "running": claimed,
        "memory": memory, "up": up, "beat_age": _age(row.beat_at, now),
        "cpu": used / up if cpu is None and used is not None and up else cpu,
        "processes": processes,
    }


def _names_in(text):
    """The queues of a worker's row; None: all."""
    try:
        return json.loads(text) if text else None
    except ValueError:                  # edited by hand
        return [text]


def _running(store, now, workers):
    """The tasks that have run the longest, and how many run in all."""
    hands = {row.task: row for row in store.runs()}
    longest = sorted(hands.values(), key=lambda row: row.began_at or math.inf)
    rows = []
    for hand in longest[:_SHOWN["running"]]:
        with contextlib.suppress(TaskNotFound):
            rows.append(store.task(hand.task))
    rows += [row for row in store.tasks(RUNNING, limit=_SHOWN["running"])
             if row.id not in hands]
    owners = {row["id"]: row for row in workers}
    found = [_run_row(store, now, row, hands.get(row.id), owners)
             for row in rows if row.state == RUNNING]
    found.sort(key=lambda run: -(run["for"] or 0))
    return found[:_SHOWN["running"]], sum(store.running_counts().values())


def _run_row(store, now, row, hand, owners):
    owner = owners.get(row.worker) or {"name": None, "processes": []}
    if hand is not None and (hand.worker, hand.attempt) != (row.worker, row.attempt):
        hand = None                     # of a run before
    process: dict = next((process for process in owner["processes"]
                    if hand is not None and process["pid"] == hand.pid), {})
    progress = None
    with contextlib.suppress(TaskNotFound, ValueError):
        progress = store.progress(row.id)
    return {
        "id": row.id, "name": row.name, "queue": row.queue, "attempt": row.attempt,
        "worker": owner["name"], "pid": hand and hand.pid,
        "in_pipe": hand is not None and hand.began_at is None,
        "for": _age((hand and hand.began_at) or row.started_at, now),
        "progress": progress,
        "memory": process.get("memory"), "cpu": process.get("cpu"),
    }


# What failed.

def failures_report(store: Store, now: int, hours: float = 1) -> dict:
    """What failed for good since, by what went wrong: `groups`, the largest first.

    See failure_groups().  Only the newest 1,000 are looked at: `capped` says that
    there are more.
    """
    rows = store.failures(now - round(hours * HOUR_MS), limit=_MOST_FAILURES)
    return {"groups": failure_groups(rows, now), "total": len(rows),
            "capped": len(rows) == _MOST_FAILURES}


def failure_ids(store: Store, now: int, hours: float, like: int) -> list[int]:
    """The ids of all that failed as this task did, among the newest 1,000."""
    rows = store.failures(now - round(hours * HOUR_MS), limit=_MOST_FAILURES)
    keys = {failure_key(row) for row in rows if row.id == like}
    return [row.id for row in rows if failure_key(row) in keys]


# What there is to run, and what people did.

def names_report(store: Store, now: int) -> list[dict]:
    """Each task that ran in the last 24 hours: runs, failures, how long, how late.

    `failures` are runs that ended badly; half, and 95 %, ran and waited that long.
    """
    rows = store.history(QUARTER, now - DAY_MS, now + 1, by="name")
    groups = _by(lambda row: row.name, rows)
    return [_name_row(name, merged(groups[name])) for name in sorted(groups)]


def _name_row(name, row):
    return {
        "name": name, "runs": row.runs, "failures": _ended_badly(row),
        "failed": row.failed, "retried": row.retried, "cancelled": row.cancelled,
        "ran_p50": quantile(row.ran, 0.5), "ran_p95": quantile(row.ran, 0.95),
        "wait_p50": quantile(row.waited, 0.5), "wait_p95": quantile(row.waited, 0.95),
    }


def schedules_report(store: Store, now: int, limit: int | None = None) -> list[dict]:
    """Each schedule with its next tick and its last run: the first to come first.

    With a `limit` only so many, and none that never comes.
    """
    rows = sorted(store.schedules(), key=_next_tick)
    if limit is not None:
        rows = [row for row in rows[:limit] if row.next_tick is not None]
    return [_schedule_row(store, row, now) for row in rows]


def _next_tick(row):
    return math.inf if row.next_tick is None else row.next_tick, row.name


def _schedule_row(store, row, now):
    next_at = None if row.next_tick is None else row.next_tick * 1000
    return {
        "schedule": row.name, "task": row.task, "expr": row.expr, "tz": row.tz,
        "misfire": row.misfire, "overlap": row.overlap, "jitter": row.jitter,
        "next_at": _iso_of(next_at),
        "next_in": None if next_at is None else max(0, next_at - now) / 1000,
        "last_at": None if row.last_tick is None else _second(row.last_tick),
        "seen_at": _iso_of(row.seen_at), "last": _last_run(store, row),
    }


def _last_run(store, row):
    """What became of the last run; None: there was none, or it is gone."""
    with contextlib.suppress(TaskNotFound):
        if row.last_id is not None:
            task = store.task(row.last_id)
            return {
                "id": task.id, "status": task.status, "duration": task.duration,
                "at": _iso_of(task.finished_at or task.started_at or task.run_at),
            }
    return None


def events_report(store: Store, before: int | None = None, limit: int = 50) -> dict:
    """What people have done, the newest first; `next` continues, None at the end."""
    rows = store.events(before, limit)
    return {
        "events": [{**row._asdict(), "at": _iso_of(row.at)} for row in rows],
        "next": rows[-1].id if len(rows) == limit else None,
    }


# == Screen ===================================================================
# Owns a terminal as a room has it: its size, its keys, the lines on it, and that it
# is given back as it was, however the program ends.  ANSI only; of the lines of a
# picture those are written that have changed.  Knows nothing of what it shows.

_ENTER = "\033[?1049h\033[?25l\033[H\033[2J"    # alternate screen, no cursor, clear
_LEAVE = "\033[0m\033[?25h\033[?1049l"
_STYLES = {"bold": "1", "dim": "2", "bad": "31", "warn": "33", "good": "32",
           "chosen": "7"}
_COLOURS = ("bad", "warn", "good")
_SPLIT_WAIT = 0.05      # seconds that the rest of a key's sequence may take
_KEYS = {
    "\033[A": "up", "\033[B": "down", "\033OA": "up", "\033OB": "down",
    "\033[5~": "page up", "\033[6~": "page down", "\033[H": "home", "\033[F": "end",
    "\033OH": "home", "\033OF": "end", "\033[1~": "home", "\033[4~": "end",
    "\r": "enter", "\n": "enter", "\033": "escape", "k": "up", "j": "down",
    " ": "page down", "b": "page up", "g": "home", "G": "end", "\x0c": "redraw",
}
_KEY = re.compile(r"\033\[[0-9;?]*[ -/]*[@-~]|\033O.|\033|.", re.S)


def width_of(text: str) -> int:
    """Columns that a text takes: wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(c) or unicodedata.category(c) in ("Mn", "Me", "Cf")
        else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def clean(text: Any) -> str:
    """A text on one line, and nothing in it that a terminal obeys."""
    return visible(" ".join(str(text).split()))


def padded(text: str, width: int, right: bool = False, cut: str = "…") -> str:
    """A clean text in exactly `width` columns.

    Too long a one ends in `cut`; a short one gets spaces, on the left with `right`.
    """
    if width_of(text) > width:
        kept = max(0, width - width_of(cut))
        while width_of(text) > kept:
            # Wide characters take two: at least half of what is too much goes at once.
            text = text[:-max(1, (width_of(text) - kept) // 2)]
        text += cut[:max(0, width)]
    filler = " " * (width - width_of(text))
    return filler + text if right else text + filler


def broken(text: str, width: int) -> list[str]:
    """A clean text in parts that fit, broken between words where they are short."""
    parts: list[str] = []
    start = 0
    while True:
        end = _reach(text, start, width)
        if end == len(text):
            return [*parts, text[start:]]
        space = text.rfind(" ", start + (end - start) // 2, end + 1)
        stop = space if space > start else end
        parts.append(text[start:stop])
        start = stop + (stop == space)


def _reach(text, start, width):
    """Where the part must end at the latest that begins at `start`."""
    window = text[start:start + max(1, width)]
    while len(window) > 1 and width_of(window) > width:
        window = window[:-1]
    return start + len(window)


def styled(line: Sequence[tuple[str, str]], colour: bool) -> str:
    """A line of (text, style) as a terminal takes it; without `colour` none."""
    parts = []
    for text, style in line:
        code = _STYLES.get(style, "") if colour or style not in _COLOURS else ""
        parts.append(f"\033[{code}m{text}\033[0m" if code and text else text)
    return "".join(parts)


class Terminal:
    """A terminal, in use as a context; signals come out of keys() like keys."""

    def __init__(self, reads: int, writes: int, encoding: str, colour: bool):
        self.reads, self.writes = reads, writes
        self.encoding, self.colour = encoding, colour
        self._lines: list[str] = []         # as they are on it
        self._width = 0
        self._mode: Any = None              # of the terminal, as it was
        self._handlers: dict = {}           # of signals, as they were
        self._wake: tuple = ()              # pipe that a signal writes to
        self._typed = ""

    def __enter__(self) -> Terminal:
        import termios

        self._mode = termios.tcgetattr(self.reads)
        try:
            self._wake = os.pipe()
            for fd in self._wake:
                os.set_blocking(fd, False)
            signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
            for name in SCREEN_SIGNALS:
                number = getattr(signal, name)
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, _note_signal)
            self.take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: Any) -> None:
        try:
            self._give_back()
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            for fd in self._wake:
                os.close(fd)

    def take(self) -> None:
        """Have it to ourselves, also after somebody else had it; all is drawn anew."""
        import termios

        mode = termios.tcgetattr(self.reads)
        mode[3] &= ~(termios.ICANON | termios.ECHO)     # Ctrl-C and Ctrl-Z stay signals
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self.reads, termios.TCSADRAIN, mode)
        self._write(_ENTER)
        self._lines = []

    def _give_back(self):
        import termios

        with contextlib.suppress(OSError):      # it is gone
            self._write(_LEAVE)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self.reads, termios.TCSADRAIN, self._mode)

    def suspend(self) -> None:
        """Stop as Ctrl-Z wants it; return when the program is to go on."""
        self._give_back()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, handler)
        self.take()

    @staticmethod
    def is_possible() -> bool:
        """True where the system has terminals of this kind."""
        return importlib.util.find_spec("termios") is not None

    def size(self) -> tuple[int, int]:
        """(columns, lines) as they are now."""
        return terminal_size(self.writes)

    def draw(self, lines: Sequence[str], width: int) -> None:
        """Make these the lines of the screen; write those that are not yet on it."""
        if width != self._width or len(lines) != len(self._lines):
            self._width, self._lines = width, [""] * len(lines)
            self._write("\033[2J")
        changed = [
            f"\033[{number};1H\033[K{new}" for number, (old, new)
            in enumerate(zip(self._lines, lines), 1) if new != old
        ]
        if changed:
            self._write("".join(changed))
        self._lines = list(lines)

    def _write(self, text):
        data = memoryview(text.encode(self.encoding, "replace"))
        while data:
            data = data[os.write(self.writes, data):]

    def keys(self, seconds: float) -> list[str]:
        """What was typed, and the names of signals, as soon as there is something."""
        ready = select.select([self.reads, self._wake[0]], [], [], max(0.0, seconds))[0]
        found = []
        if self._wake[0] in ready:
            with contextlib.suppress(BlockingIOError):
                found = [signal.Signals(number).name for number
                         in os.read(self._wake[0], 1000)]
        if self.reads in ready:
            typed = self._read()
            if re.search(r"\033([\[O][0-9;]*)?\Z", typed) \
                    and select.select([self.reads], [], [], _SPLIT_WAIT)[0]:
                typed += self._read()
            found += [_KEYS.get(key, key) for key in _KEY.findall(typed)]
        return found

    def _read(self):
        typed = os.read(self.reads, 1000)
        if not typed:
            raise OSError(errno.EIO, "the terminal is closed")
        return typed.decode("utf-8", "replace")


SCREEN_SIGNALS = ("SIGWINCH", "SIGTSTP", "SIGCONT", "SIGTERM", "SIGHUP", "SIGQUIT")


def _note_signal(number, frame):
    """The wake-up pipe has told."""


def terminal_size(fd: int) -> tuple[int, int]:
    """(columns, lines) of a terminal; 80 and 24 where nobody can tell."""
    try:
        width, height = os.get_terminal_size(fd)
    except OSError:
        return 80, 24
    return width or 80, height or 24


# == Frame ====================================================================
# Owns how an overview looks as lines of text, as many and as wide as there is room
# for.  Pure: a dict in, lines out.  A line is a list of (text, style).

class Glyphs(NamedTuple):
    """The characters of a frame that not every terminal has."""

    bad: str = "×"
    none: str = "–"
    cut: str = "…"
    dot: str = "·"
    full: str = "█"
    parts: str = "▏▎▍▌▋▊▉"      # eighths of a full one
    levels: str = " ▁▂▃▄▅▆▇█"
    page_keys: str = "q back  ↑↓ move  w why  l logs  ⏎ show  c cancel  r retry"
    few_keys: str = "q quit  ? all keys"
    keys: str = ("q quit  ↑↓ choose  ⏎ show  w why  l logs  c cancel  r retry  "
                 "p pause  ? all keys")
    reading_keys: str = "q quit  ↑↓ choose  ⏎ show  w why  l logs  ? all keys"


PLAIN_GLYPHS = Glyphs(
    "x", "-", "~", ".", "#", "", " ..::++##",
    "q back  up/down  w why  l logs  enter show  c cancel  r retry",
    "q quit  ? all keys",
    "q quit  up/down  enter show  w why  l logs  c cancel  r retry  p pause  ? keys",
    "q quit  up/down  enter show  w why  l logs  ? keys")


NARROW = 60            # columns; below, a queue has the three that matter most
_WIDE = 110             # columns from which there is room for more
_ROOMY = 20             # lines from which blank ones are not a waste
_TINY = 10              # lines up to which schedules are left out
_MORE_TO = (2, 1, 3, 0)     # blocks in the order in which they get lines to spare
_BAD_SHARE = 0.05       # of runs that failed, in the last ten minutes
_OLD = 300              # seconds that a task waits, until it is in red


def glyphs_of(encoding: str) -> Glyphs:
    """Those that a terminal of this encoding has."""
    try:
        "".join(Glyphs()).encode(encoding)
    except (UnicodeError, LookupError):
        return PLAIN_GLYPHS
    return Glyphs()


class Spot(NamedTuple):
    """A row of a frame that can be chosen."""

    line: int
    kind: str               # queue, task or failure
    key: Any                # what makes it the same in the next frame
    row: dict


def briefly(seconds: float | None, none: str = "–") -> str:
    """Seconds in at most 7 characters: 400 ms, 3.1 s, 38 s, 21 min, 2.5 h, 9 d."""
    if seconds is None:
        return none
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.5:
        return f"{_number(seconds)} s"
    if seconds < 5370:
        return f"{seconds / 60:.0f} min"
    if seconds < 171_000:
        return f"{_number(seconds / 3600)} h"
    return f"{min(seconds / 86400, 99999):.0f} d"


def _number(value):
    """With one decimal, if it is below ten and has one."""
    text = f"{value:.1f}" if value < 9.95 else f"{value:.0f}"
    return text[:-2] if text.endswith(".0") else text


def _share(part, none):
    return none if part is None else f"{_number(100 * part)} %"


def bytes_briefly(count: int | None, none: str = "–") -> str:
    """Bytes in at most 5 characters: 88 M, 1.9 G."""
    if count is None:
        return none
    value = count / 1024
    for unit in "KMGT":
        if value < 999.5 or unit == "T":
            return f"{_number(value)} {unit}"
        value /= 1024
    raise AssertionError


def _bars(counts, busiest, glyphs):
    """A character for each count; the busiest minute of the hour is a full one."""
    top = len(glyphs.levels) - 1
    return "".join(
        glyphs.levels[min(top, math.ceil(count * top / busiest)) if count > 0 else 0]
        for count in counts) if busiest else ""


def _progress(progress, width, glyphs):
    """`62 % ██████▏···  frame`; what has only said something, only that."""
    percent, message = progress if isinstance(progress, list) and len(progress) == 2 \
        and isinstance(progress[0], (int, float)) else (0, None)
    said = "" if message is None else clean(message)
    if not percent:
        return padded(said or glyphs.none, width, cut=glyphs.cut)
    whole, part = divmod(max(0, min(80, int(percent * 0.8))), 8)
    bar = glyphs.full * whole
    if part and glyphs.parts:
        bar += glyphs.parts[part - 1]
    shown = f"{min(percent, 999):2.0f} % {bar.ljust(10, glyphs.dot)}  {said}"
    return padded(shown, width, cut=glyphs.cut)


class _Block(NamedTuple):
    """Rows under a title: (line, kind, key, what it is of) each."""

    title: list             # lines; not there without rows
    rows: list
    total: int              # of which some may not be here
    least: int              # lines it has if possible, before others have more

    @property
    def wanted(self) -> int:
        """Lines for all rows, and for saying how many are not here."""
        return len(self.rows) + (self.total > len(self.rows))

    @property
    def lines(self) -> int:
        """All that it would have, if there was room."""
        return self.wanted + (len(self.title) if self.rows else 0)


def frame(view: dict, width: int, height: int, glyphs: Glyphs = Glyphs(),
          chosen: tuple | None = None, note: str = "",
          last: str = "") -> tuple[list, list[Spot]]:
    """(the lines of an overview, the rows in them that can be chosen).

    Of `chosen`, the (kind, key) of a row, the line is marked.  `note` stands where the
    time was, `last` is the last line.  At most `height` lines: each block has its
    share, the rest goes to those that have more.
    """
    lines = [_header(view, width, glyphs, note)]
    tail = _next_line(view, width, glyphs) if height > _TINY else []
    if last:
        tail.append([(padded(last, width, cut=glyphs.cut).rstrip(), "dim")])
    gap: list = [[]] if height >= _ROOMY else []
    blocks = [_alerts_block(view, width, glyphs),
              _queues_block(view, width, glyphs, gap),
              _tasks_block(view, width, glyphs, gap),
              _failed_block(view, width, glyphs)]
    room = height - len(lines) - len(tail)
    for number, shorter in (
        (0, lambda: _alerts_block(view, 0, glyphs)),
        (1, lambda: _queues_block(view, width, glyphs, gap, only_late=True)),
    ):
        if sum(block.lines for block in blocks) > room:
            blocks[number] = shorter()
    if not any(block.rows for block in blocks):
        lines += [*gap, [("nothing waits, and nothing runs", "")]]
    spots: list[Spot] = []
    shares = _shares(blocks, height - len(lines) - len(tail))
    for block, share in zip(blocks, shares):
        _put(block, share, lines, spots, chosen)
    if last:                            # at the foot of the screen
        lines += [[]] * (height - len(lines) - len(tail))
    lines = (lines + tail)[:max(1, height)]
    spots = [spot for spot in spots if spot.line < len(lines)]
    return [_cut_line(line, width, glyphs) for line in lines], spots


def _shares(blocks, room):
    """How many lines of rows each block has, so that all fit."""
    shares = [min(block.wanted, block.least) for block in blocks]

    def spare():
        return room - sum(share + len(block.title)
                          for block, share in zip(blocks, shares) if share)

    while spare() < 0 and any(shares):
        largest = max(range(len(shares)), key=lambda n: (shares[n], n))
        shares[largest] -= 1
    while spare() > 0:
        more = [n for n in _MORE_TO if 0 < shares[n] < blocks[n].wanted]
        if not more:
            break
        for n in more[:spare()]:
            shares[n] += 1
    return shares


def _put(block, share, lines, spots, chosen):
    """Add the lines of a block that has so many of them for its rows."""
    if not share:
        return
    lines += block.title
    says_more = share > 1 and (share < block.wanted or share > len(block.rows))
    first = sorted(block.rows, key=_rank)[:share - says_more]
    rows = [row for row in block.rows if row in first]
    for line, kind, key, row in rows:
        if kind is not None:
            spots.append(Spot(len(lines), kind, key, row))
        lines.append(_marked(line) if chosen == (kind, key) else line)
    if says_more:
        lines.append([(f"  {block.total - len(rows):,} more", "dim")])


def _rank(row):
    """Which rows go first where there is not room for all: of queues the longest."""
    return -row[3]["waiting"] if row[1] == "queue" else 0


def _marked(line):
    """As the chosen one: the other way round, with a mark if there is room for it."""
    text = "".join(part for part, _ in line)
    return [(">" + text[1:] if text.startswith(" ") else text, "chosen")]


def _header(view, width, glyphs, note):
    figures = view["figures"]
    name = clean(os.path.basename(view["database"]) or view["database"])
    share, none = figures["failed_share"], glyphs.none
    is_bad = share is not None and share > _BAD_SHARE
    clock = local_time(view["at"], "%H:%M:%S %Z")
    parts = [(f"{name}  ", "bold"), (f"{note or clock}   ", "bad" if note else ""),
             (f"{figures['runs_per_minute']:,}/min  ", ""),
             (f"{_share(share, none)} failed   ", "bad" if is_bad else "")]
    if width >= NARROW:
        parts.append((f"wait p95 {briefly(figures['wait_p95'], none)}   ", ""))
        parts.append((f"{figures['busy']}/{figures['children']} busy, "
                      f"{figures['workers']} w" if figures["workers"] else "no worker",
                      "" if figures["workers"] else "bad"))
    if width >= _WIDE:
        parts.append((f"   {figures['waiting']:,} waiting", ""))
        if figures["oldest"] is not None:
            parts.append((f", oldest {briefly(figures['oldest'])}", ""))
        parts.append((f"   {figures['later']:,} later", ""))
    return parts


def _cut_line(parts, width, glyphs):
    """A line of (text, style) that is not too wide."""
    line = []
    for text, style in parts:
        if width_of(text) > width:
            text = padded(text, width, cut=glyphs.cut)
        line.append((text, style))
        width -= width_of(text)
        if width <= 0:
            break
    return [(text, style) for text, style in line if text]


def _alerts_block(view, width, glyphs):
    """A sentence on as many lines as it takes; with a width of 0 on one."""
    rows = []
    for alert in view["attention"]:
        sign, style = (glyphs.bad, "bad") if alert["level"] == "bad" else ("!", "warn")
        text = clean(alert["say"])
        for n, part in enumerate(broken(text, width - 2) if width > 10 else [text]):
            rows.append(([(f"{' ' if n else sign} {part}", style)], None, None, alert))
    return _Block([], rows, len(rows), 3)


def _queues_block(view, width, glyphs, gap, only_late=False):
    queues = [row for row in view["queues"]
              if row["waiting"] or row["paused"] or not only_late]
    is_narrow = width < NARROW
    fixed = 23 if is_narrow else 68
    longest = max((width_of(clean(row["queue"])) for row in queues), default=0)
    room = max(8, min(width - fixed, max(12, longest)))
    titles = ["WAITING", "OLDEST", "RUN", "IN/MIN", "OUT/MIN", "EMPTY IN"]
    sizes = [9, 9, 5, 8, 9, 10]
    number = 3 if is_narrow else 6
    head = padded("QUEUE", room) + "".join(
        title.rjust(size) for title, size in zip(titles[:number], sizes))
    if not is_narrow:
        head += "   LAST 15 MIN"
    rows = [(_queue_line(row, room, sizes[:number], glyphs), "queue", row["queue"], row)
            for row in queues]
    return _Block([*gap, [(head, "bold")]], rows, len(rows), 4)


def _queue_line(row, room, sizes, glyphs):
    empty = row["empty_in"]
    cells = [f"{row['waiting']:,}", briefly(row["oldest"], glyphs.none),
             f"{row['running']:,}", f"{row['in_per_minute']:,}",
             f"{row['out_per_minute']:,}",
             empty if isinstance(empty, str) else briefly(empty, glyphs.none)]
    styles = ["", "bad" if (row["oldest"] or 0) > _OLD else "", "", "", "",
              {"paused": "bad", "never": "warn"}.get(empty, "")]
    line = [(padded(clean(row["queue"]), room, cut=glyphs.cut), "")]
    line += [(padded(text, size, right=True), style)
             for text, size, style in zip(cells, sizes, styles)]
    if len(sizes) == len(cells):
        line.append(("   " + _bars(row["bars"], row["busiest"], glyphs), ""))
    return line


def _tasks_block(view, width, glyphs, gap):
    runs = view["running"]
    names = [clean(run["name"]) for run in runs]
    ons = [clean(run["worker"] or glyphs.none) for run in runs]
    size = max([5, *(len(str(run["id"])) for run in runs)])
    on = min(max([2, *map(width_of, ons)]), 8 if width < _WIDE else 24)
    # Of what is left, the name has what it needs, but leaves so much for progress.
    left = width - 1 - (2 + size + 2) - (2 + on) - (2 + 6 + 2) - (2 + 5) - (2 + 6)
    room = max(4, min(max(map(width_of, names), default=4), left - 15))
    said = max(0, left - room)
    if width < NARROW:
        room = max(4, width - size - 12)
    head = f"  {'TASK':>{size}}  {padded('NAME', room)}  "
    head += f"{'FOR':>6}" if width < NARROW else (
        f"{padded('ON', on)}  {'FOR':>6}  {padded('PROGRESS', said)}  {'MEM':>5}  "
        f"{'CPU':>6}")
    rows = []
    for run, name, worker in zip(runs, names, ons):
        begun = f"{briefly(run['for'], glyphs.none):>6}"
        text = f"  {run['id']:>{size}}  {padded(name, room, cut=glyphs.cut)}  "
        if width < NARROW:
            line = [(text + begun, "")]
        else:
            line = [(f"{text}{padded(worker, on, cut=glyphs.cut)}  {begun}  ", ""),
                    _said_cell(run, said, glyphs),
                    (f"  {bytes_briefly(run['memory'], glyphs.none):>5}"
                     f"  {_share(run['cpu'], glyphs.none):>6}", "")]
        rows.append((line, "task", run["id"], run))
    return _Block([*gap, [(head, "bold")]], rows, view["running_total"], 5)


def _said_cell(run, room, glyphs):
    if run["in_pipe"]:
        return padded("waits for its child", room, cut=glyphs.cut), "dim"
    return _progress(run["progress"], room, glyphs), ""


def _failed_block(view, width, glyphs):
    groups = view["failures"]
    names = max((width_of(clean(row["name"])) for row in groups), default=0)
    name = min(names, max(8, width // 3))
    rows = []
    for row in groups:
        ago = f"{briefly(row['last_age'])} ago"
        room = max(4, width - 1 - 8 - name - 2 - 2 - len(ago))
        cells = (padded(clean(row[key]), size, cut=glyphs.cut)
                 for key, size in (("name", name), ("error", room)))
        text = "  ".join([f"{row['count']:>6,}", *cells, ago])
        rows.append(([(text, "")], "failure",
                     (row["name"], row["kind"], row["type"], row["pattern"]), row))
    capped = " (OF THE NEWEST 1,000)" if view["failures_capped"] else ""
    title = [(f"FAILED, LAST HOUR{capped}", "bold")]
    return _Block([title], rows, view["failures_groups"], 2)


def _next_line(view, width, glyphs):
    """Nothing, or a line of the schedules that come first."""
    text = ""
    for row in view["next"]:
        one = f"{clean(row['schedule'])} {briefly(row['next_in'], glyphs.none)}"
        longer = f"{text} {glyphs.dot} {one}" if text else one
        if width_of(longer) > width - 6 and text:
            break
        text = longer
    line = [("NEXT", "bold"), (f"  {text}", "")]
    return [line] if text else []


# == Top ======================================================================
# Owns `top`: an overview that is drawn again and again, what keys do with its rows,
# and the pages of text behind them.  What it changes it changes by verbs of the store,
# in the name of whoever is logged in.

_PATIENCE = 1.0         # seconds that `top` waits for a locked database
_LEAST_PAUSE = 20       # times what a look has cost: a twentieth of a CPU at most
_LONGEST_PAGE = 200_000     # characters that are shown of a text
_WHOLE = 1000           # lines of a frame that is only printed: it has all
_ENDS = ("SIGTERM", "SIGHUP", "SIGQUIT")
_GONE = (errno.EIO, errno.ENXIO, errno.EBADF, errno.EPIPE)      # of a terminal
_HELP = """\
q            quit; on a page: back to the overview
↑ ↓  k j     choose a row; on a page: move through it, also by
             Page Up, Page Down, Home, End
⏎            show the task; of a group that failed the newest; the tasks of a queue
w            why: what holds the task, what it does, or how it ended; of a queue,
             all that needs you
l            logs: what the task has printed, and prints
c            cancel the task
r            retry the task, or all of a group that failed
p            pause the queue, or that of the task; resume it, if it is paused
Ctrl-L       draw everything anew
Esc          back; to a question: no

c, r and p ask first, and want a y.  Below the attention list are the queues, what
runs, the longest first, what failed for good in the last hour, and what schedules
enqueue next.  IN/MIN counts tasks of the last minute that may run at once, OUT/MIN
those that finished; EMPTY IN is what waits at that pace.  The bars are the finished of
15 minutes, against the busiest minute of this hour."""


class _Page:
    """A page of text over the overview."""

    def __init__(self, title: str, read: Callable[[], str], task: int | None = None,
                 follows: bool = False):
        self.title, self.read, self.task = title, read, task
        self.follows = follows      # shows the end, while it grows
        self.text = ""
        self.first = 0              # line at the top of the screen

    def look(self) -> None:
        """Read what it shows as of now."""
        try:
            text = self.read()
            if len(text) > _LONGEST_PAGE:
                rest = f"… {len(text) - _LONGEST_PAGE:,} characters more …"
                text = f"{rest}\n{text[-_LONGEST_PAGE:]}" if self.follows else \
                    f"{text[:_LONGEST_PAGE]}\n{rest}"
            self.text = text
        except TaskNotFound as exc:
            self.text = self.text or str(exc)

    def lines(self, width: int, height: int) -> list[str]:
        """Those to be shown now, broken where they are too wide."""
        lines = [part for line in visible(self.text).expandtabs().split("\n")
                 for part in broken(line, width)]
        last = max(0, len(lines) - height)
        self.first = last if self.follows else max(0, min(self.first, last))
        return lines[self.first:self.first + height]

    def move(self, key: str, height: int) -> None:
        """Obey a key that moves through text."""
        if key in ("up", "page up", "home"):
            self.follows = False
        self.first += {"up": -1, "down": 1, "page up": -height, "page down": height,
                       "home": -10**9, "end": 10**9}[key]


class _Question(NamedTuple):
    """What a key would change, before it does."""

    text: str
    act: Callable[[], str]      # does it; what was done, for the last line


class Top:
    """What is on the screen, and what is done with it."""

    def __init__(self, app: App, screen: Terminal, interval: float, read_only: bool):
        self.app, self.screen = app, screen
        self.interval, self.read_only = interval, read_only
        self.glyphs = glyphs_of(screen.encoding)
        self.beats = Beats()
        self.view: dict = {}
        self.note = ""              # that there is no answer, and since when
        self.message = ""           # what came of the last key
        self.spots: list[Spot] = []
        self.moved: tuple | None = None     # (kind, key) that somebody has moved to
        self.page: _Page | None = None
        self.question: _Question | None = None

    def run(self) -> int:
        """Show and obey until told to end; return the exit status."""
        look_at = 0.0
        while True:
            began = time.monotonic()
            if began >= look_at:
                self.look()
                cost = time.monotonic() - began
                look_at = began + max(self.interval, _LEAST_PAUSE * cost)
            self.draw()
            for key in self.screen.keys(look_at - time.monotonic()):
                if key in _ENDS:
                    return 128 + getattr(signal, key)
                if key == "q" and self.page is None and self.question is None:
                    return 0
                if self.press(key):
                    look_at = 0.0

    def look(self) -> None:
        """Read what is shown.  Without an answer it stays, and says since when."""
        store = self.app.store
        try:
            self.view = overview(store, self.app.settings, store.now(),
                                 beats=self.beats)
            if self.page is not None:
                self.page.look()
            if self.note:
                self.note = self.message = ""
        except DatabaseUnavailable as exc:
            if not self.view:
                raise
            clock = local_time(self.view["at"], "%H:%M:%S")
            self.note = f"no answer since {clock}"
            self.message = str(exc)

    def draw(self) -> None:
        """Put the overview, or the page over it, on the screen."""
        width, height = self.screen.size()
        if self.page is not None:
            lines = self._page_lines(self.page, width, height)
        else:
            chosen = self.chosen
            lines, self.spots = self._frame(width, height)
            if self.chosen != chosen:
                lines, self.spots = self._frame(width, height)
        colour = self.screen.colour
        texts = [styled(line, colour) for line in lines]
        self.screen.draw(texts + [""] * (height - len(texts)), width)

    def _frame(self, width, height):
        lines, spots = frame(self.view, width, height, self.glyphs, self.chosen,
                             self.note, self._last(width))
        if self.question or self.message:
            lines[-1] = [(text, "warn") for text, _ in lines[-1]]
        return lines, spots

    def _last(self, width):
        """What the last line says: a question, what came of a key, or the keys."""
        if self.question is not None:
            return clean(self.question.text)
        if self.message:
            return clean(self.message)
        if width < NARROW:
            return self.glyphs.few_keys
        return self.glyphs.reading_keys if self.read_only else self.glyphs.keys

    def _page_lines(self, page, width, height):
        head = padded(f"{clean(page.title)}   {self.note}".rstrip(), width,
                      cut=self.glyphs.cut)
        said = self.question or self.message
        last = self._last(width) if said else self.glyphs.page_keys
        body = [[(line, "")] for line in page.lines(width, height - 2)]
        body += [[]] * (height - 2 - len(body))
        return [[(head, "bold")], *body, [(padded(last, width, cut=self.glyphs.cut),
                                           "warn" if said else "dim")]]

    # -- keys

    def press(self, key: str) -> bool:
        """Obey a key, or a signal.  True: something may have changed, look again."""
        if key == "SIGTSTP":
            self.screen.suspend()
            return True
        if key in ("SIGCONT", "redraw"):
            self.screen.take()
            return True
        if key == "SIGWINCH":
            return False
        question, self.question = self.question, None
        self.message = ""
        if question is not None:
            self.message = self._do(question.act) if key in ("y", "Y") else \
                "nothing was changed"
            return True
        if key in ("q", "escape"):
            self.page = None
        elif key in ("up", "down", "page up", "page down", "home", "end"):
            self._move(key)
        elif key in _ACTS:
            self.message = self._do(functools.partial(_ACTS[key], self)) or ""
            return True
        return False

    def _do(self, act):
        """What an act says; what is wrong, if it cannot be done."""
        try:
            return act()
        except PyBgWorkerError as exc:
            return str(exc)

    def _move(self, key):
        if self.page is not None:
            return self.page.move(key, max(1, self.screen.size()[1] - 3))
        keys = [(spot.kind, spot.key) for spot in self.spots]
        if self.chosen is not None:
            here = keys.index(self.chosen)
            to = {"up": here - 1, "down": here + 1, "page up": 0, "home": 0}.get(
                key, len(keys) - 1)
            self.moved = keys[max(0, min(to, len(keys) - 1))]
        return None

    @property
    def chosen(self) -> tuple | None:
        """(kind, key) of the row that keys are about.

        Until somebody has moved: the first that runs, else the first that failed.
        """
        keys = [(spot.kind, spot.key) for spot in self.spots]
        if self.moved in keys:
            return self.moved
        order = ("task", "failure", "queue")
        return min(keys, key=lambda key: order.index(key[0]), default=None)

    def spot(self) -> Spot:
        """The row that is chosen.  Raises Problem: there is none."""
        for spot in self.spots:
            if (spot.kind, spot.key) == self.chosen:
                return spot
        raise Problem("there is nothing to choose")

    def task(self) -> int:
        """The task that a key is about.  Raises Problem."""
        if self.page is not None and self.page.task is not None:
            return self.page.task
        spot = self.spot()
        if self.page is not None or spot.kind == "queue":
            raise Problem("choose a task for that")
        return spot.key if spot.kind == "task" else spot.row["ids"][0]

    def open(self, page: _Page) -> None:
        """Show a page."""
        page.look()
        self.page = page

    def ask(self, text: str, act: Callable[[], str]) -> None:
        """Have it done after a y.  Raises Problem where nothing may be changed."""
        if self.read_only:
            raise Problem("nothing can be changed here: --read-only")
        self.question = _Question(f"{text}? y/N", act)


# What a key does: a table of functions that are given the Top.

def _show_it(top):
    store = top.app.store
    if top.page is None and top.spot().kind == "queue":
        queue = top.spot().key
        return top.open(_Page(f"queue {queue}: its newest tasks", lambda: list_text(
            page_report(store, Filter(queue=queue), 100))))
    task = top.task()

    def read():
        reason = why(store, task, store.now(), top.app.settings)
        return f"{reason_text(reason)}\n\n{show_text(show_report(store, task))}"

    return top.open(_Page(f"task {task}", read, task))


def _why_it(top):
    store, settings = top.app.store, top.app.settings
    if top.page is None and (not top.spots or top.spot().kind == "queue"):
        return top.open(_Page("what needs you", lambda: attention_text(
            attention(store, store.now(), settings))))
    task = top.task()
    return top.open(_Page(f"why {task}", lambda: reason_text(
        why(store, task, store.now(), settings)), task))


def _logs_of(top):
    store, task = top.app.store, top.task()
    parts: list[str] = []
    follower = Follower(store, task, None, lambda _, text: parts.append(text),
                        lambda text: parts.append(f"\n{text}\n"))

    def read():
        row = follower.look()
        so_far = "" if row.state in FINISHED else " so far"
        return "".join(parts) or f"It has printed nothing{so_far}."

    top.open(_Page(f"logs {task}", read, task, follows=True))


def _cancel_it(top):
    store, task = top.app.store, top.task()
    row = store.task(task)
    if row.state in FINISHED:
        raise Problem(f"task {task} is {row.status} already: nothing to cancel")

    def act():
        before = store.cancel(task, store.now(), by=by_me())
        if before in FINISHED:
            return f"task {task} is {state_name(before)} already: nothing to cancel"
        return f"task {task} is {'being ended' if before == RUNNING else 'cancelled'}"

    top.ask(f"cancel {task} {row.name}", act)


def _retry_it(top):
    store, task = top.app.store, top.task()
    row = store.task(task)
    if top.page is None and top.spot().kind == "failure":
        return _retry_group(top, task, row.name)
    if row.state not in FINISHED:
        raise Problem(f"task {task} is {row.status}: "
                      "only a finished one can be retried")

    def act():
        store.retry(task, store.now(), by=by_me())
        return f"task {task} is queued again"

    return top.ask(f"retry {task} {row.name}", act)


def _retry_group(top, task, name):
    """All that failed as this task did; they are found before the question."""
    store = top.app.store
    ids = failure_ids(store, store.now(), 1, task)
    if not ids:
        raise Problem(f"task {task} is no longer among what failed")

    def act():
        now, done, after = store.now(), 0, None
        while True:
            acted = store.act("retry", ids, now, by_me(), after=after)
            done, after = done + acted.done, acted.next
            if not acted.left:
                return f"{done:,} of {len(ids):,} are queued again"

    top.ask(f"retry {len(ids):,} failed {name}", act)


def _pause_it(top):
    store = top.app.store
    here = top.spot() if top.page is None else None
    queue = here.key if here and here.kind == "queue" else store.task(top.task()).queue

    def pause():
        store.pause(queue, store.now(), by=by_me())
        return f"queue {queue} is paused: nothing is claimed from it until resume"

    def resume():
        is_new = store.resume(queue, by=by_me())
        return f"queue {queue} goes on" if is_new else f"queue {queue} is not paused"

    if queue in store.paused_queues():
        return top.ask(f"resume {queue}", resume)
    return top.ask(f"pause {queue}", pause)


def _help_it(top):
    top.open(_Page("all keys", lambda: _HELP))


_ACTS: dict[str, Callable] = {
    "enter": _show_it, "w": _why_it, "l": _logs_of, "c": _cancel_it, "r": _retry_it,
    "p": _pause_it, "?": _help_it,
}


def _interval(text):
    with contextlib.suppress(ValueError):
        if 0.1 <= parse_grace(text) <= 3600:
            return parse_grace(text)
    raise ValueError("seconds from 0.1 to 3,600")


@command("top", "watch queues, what runs and what failed; act on it",
         "top --interval 5",
         flag("--interval", metavar="S", type=typed(_interval), default=2.0,
              help="seconds between two looks, 0.1 to 3,600 (default: 2)"),
         flag("--once", action="store_true", help="print one frame, and end"),
         flag("--read-only", action="store_true",
              help="leave out the keys that change something"),
         reads=True)
def _top(args, app):
    app.override(busy_timeout=min(_PATIENCE, app.settings.busy_timeout))
    is_seen = is_terminal(sys.stdout)
    if args.json or args.once or not is_seen or not is_terminal(sys.stdin) \
            or os.environ.get("TERM") == "dumb" or not Terminal.is_possible():
        view = overview(app.store, app.settings, app.store.now())
        return json.dumps(view, indent=2, default=repr) if args.json else \
            _printed_frame(view, is_seen)
    encoding = sys.stdout.encoding or "ascii"
    try:
        with Terminal(sys.stdin.fileno(), sys.stdout.fileno(), encoding,
                      "NO_COLOR" not in os.environ) as screen:
            return Top(app, screen, args.interval, args.read_only).run()
    except OSError as exc:
        if exc.errno in _GONE:          # nobody looks any more
            return 0
        raise


def _printed_frame(view, is_seen):
    """One frame, with all of its rows."""
    width = terminal_size(sys.stdout.fileno())[0] if is_seen else 80
    glyphs = glyphs_of(sys.stdout.encoding or "ascii")
    lines, _ = frame(view, width, _WHOLE, glyphs)
    colour = "NO_COLOR" not in os.environ
    return "\n".join(
        styled(line, colour) if is_seen else "".join(text for text, _ in line).rstrip()
        for line in lines)


# == Metrics ==================================================================
# Owns what Prometheus reads, as text of its format 0.0.4: names, labels and help are
# a contract.  Every counter is a sum of rows that never falls: each process that
# answers says the same, and a restart begins nothing anew.  No label is a worker, a
# host, or anything that a run has said.

_MOST_PAIRS = 200           # (task, queue) told apart; and queues
_MOST_SCHEDULES = 1000
_OTHER = "other"            # task, or queue, of all that are more
# The upper bounds of the two histograms: some of HISTORY_BOUNDS.
_METRIC_BOUNDS = (.005, .025, .1, .25, .5, 1, 2.5, 5, 10, 25, 100, 250, 1000)
_BOUND_PLACES = tuple(
    (bound, HISTORY_BOUNDS.index(bound) + 1) for bound in _METRIC_BOUNDS)
_HISTORY_LOOK_MS = 3 * HOUR_MS      # how long minutes of history are kept


def _label_value(text):
    """A text inside the quotes of a label; of lone surrogates their names."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _labels(**labels):
    return ",".join(f'{key}="{_label_value(str(value))}"'
                    for key, value in labels.items())


class MetricsPage:
    """Collects families of samples, in the order of calls."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def family(self, name: str, kind: str, meaning: str,
               samples: Iterable[tuple[str, float]]) -> None:
        """`samples` are (labels, value); labels as they stand between the braces."""
        self._head(name, kind, meaning)
        for labels, value in samples:
            self._sample(name, labels, value)

    def histogram(self, name: str, meaning: str,
                  samples: Iterable[tuple[str, tuple, int]]) -> None:
        """`samples` are (labels, counts by HISTORY_BOUNDS, sum in milliseconds)."""
        self._head(name, "histogram", meaning)
        for labels, counts, ms in samples:
            for bound, place in _BOUND_PLACES:
                self._sample(f"{name}_bucket", f'{labels},le="{float(bound)}"',
                             sum(counts[:place]))
            self._sample(f"{name}_bucket", f'{labels},le="+Inf"', sum(counts))
            self._sample(f"{name}_sum", labels, ms / 1000)
            self._sample(f"{name}_count", labels, sum(counts))

    def _head(self, name, kind, meaning):
        self.lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]

    def _sample(self, name, labels, value):
        braces = f"{{{labels}}}" if labels else ""
        self.lines.append(f"{name}{braces} {value!r}")

    def text(self) -> str:
        """The page; each line ends with a line feed."""
        return "\n".join([*self.lines, ""])


def metrics_text(store: Store, settings: types.SimpleNamespace, now: int) -> str:
    """What there is to be measured of a queue, as Prometheus reads it."""
    page = MetricsPage()
    page.family("pybgworker_info", "gauge",
                "Version of the program that answers, and of the schema.",
                [(_labels(version=__version__, schema=SCHEMA_VERSION), 1)])
    _add_runs(page, _pairs(store.totals()))
    _add_queues(page, store.queues(now), now)
    _add_workers(page, store, settings, now)
    _add_schedules(page, store.schedules())
    _add_database(page, store, now)
    return page.text()


def _pairs(totals):
    """[(labels, HistoryRow)]: one for each task and queue, and one for what is more.

    Those are told apart that have run most; and by powers of four only, lest two that
    run about as often change places all the time: with each change the sum of the
    others starts anew.
    """
    found = sorted(
        totals, key=lambda row: (-(row.runs.bit_length() // 2), row.lo, row.name))
    groups: dict[str, list] = {}
    more = len(found) > _MOST_PAIRS
    for place, row in enumerate(found):
        name, queue = row.name, row.queue
        if more and place >= _MOST_PAIRS - 1:
            name = queue = _OTHER
        groups.setdefault(_labels(task=name, queue=queue), []).append(row)
    return [(labels, rows[0] if len(rows) == 1 else merged(rows))
            for labels, rows in sorted(groups.items())]


def _add_runs(page, pairs):
    page.family(
        "pybgworker_task_runs_total", "counter",
        "Runs that ended, by how; a run that is retried counts as retried.",
        [(f'{labels},outcome="{outcome}"', value) for labels, row in pairs
         for outcome, value in (
             ("success", row.succeeded), ("failed", row.failed),
             ("retried", row.retried), ("cancelled", row.cancelled))])
    page.family(
        "pybgworker_task_errors_total", "counter",
        "Runs that ended badly, by kind.",
        [(f'{labels},kind="{kind}"', value) for labels, row in pairs
         for kind, value in (
             ("exception", row.exceptions), ("timeout", row.timeouts),
             ("crash", row.crashed), ("lost", row.lost), ("abort", row.aborted))])
    page.histogram(
        "pybgworker_task_duration_seconds", "Seconds a run took in the child.",
        [(labels, row.ran, row.ran_ms) for labels, row in pairs])
    page.histogram(
        "pybgworker_task_wait_seconds", "Seconds from due to begun.",
        [(labels, row.waited, row.waited_ms) for labels, row in pairs])


_QUEUE_STATES = ("scheduled", "retrying", "queued", "running")


def _add_queues(page, rows, now):
    if len(rows) > _MOST_PAIRS:
        rows = sorted(rows, key=lambda row: (
            row.paused_at is None, row.oldest_at is None, row.oldest_at or 0))
        rows = [*rows[:_MOST_PAIRS - 1], _joined_queue(rows[_MOST_PAIRS - 1:])]
    page.family(
        "pybgworker_queue_tasks", "gauge", "Unfinished tasks.",
        [(_labels(queue=row.name, state=state), getattr(row, state))
         for row in rows for state in _QUEUE_STATES])
    page.family(
        "pybgworker_queue_oldest_seconds", "gauge",
        "Seconds since the oldest task that may run became due; 0: none waits.",
        [(_labels(queue=row.name),
          0 if row.oldest_at is None else max(0, now - row.oldest_at) / 1000)
         for row in rows])
    page.family(
        "pybgworker_queue_paused", "gauge", "1 while paused.",
        [(_labels(queue=row.name), int(row.paused_at is not None)) for row in rows])


def _joined_queue(rows):
    """Many queues as one, which is not paused; the first is that of the eldest."""
    counts = {state: sum(getattr(row, state) for row in rows)
              for state in _QUEUE_STATES}
    return rows[0]._replace(
        name=_OTHER, paused_at=None, paused_by=None, reason=None, **counts)


def worker_state(row: WorkerRow, is_dead: bool, now: int, worker_timeout: float) -> str:
    """live, dead, starting or stopping.  One that is silent for so long is dead for
    the others, which take over its tasks."""
    if is_dead or now - row.beat_at > worker_timeout * 1000:
        return "dead"
    return row.state if row.state in ("starting", "stopping") else "live"


def _add_workers(page, store, settings, now):
    rows, judge = store.workers(), judge_of(store)
    states = {row.id: worker_state(row, judge(row), now, settings.worker_timeout)
              for row in rows}
    alive = [row for row in rows if states[row.id] != "dead"]
    ids = {row.id for row in alive}
    children = [child for child in store.children() if child.worker in ids]
    busy = sum(child.running > 0 for child in children)
    page.family(
        "pybgworker_workers", "gauge", "Registered workers.",
        [(_labels(state=state), [*states.values()].count(state))
         for state in ("live", "dead", "starting", "stopping")])
    idle = max(0, sum(row.concurrency for row in alive) - busy)
    page.family(
        "pybgworker_worker_children", "gauge", "Children of live workers.",
        [('state="busy"', busy), ('state="idle"', idle)])
    page.family(
        "pybgworker_worker_heartbeat_age_seconds", "gauge",
        "Age of the oldest heartbeat of a registered worker.",
        [("", max(0, now - min(row.beat_at for row in rows)) / 1000)] if rows else [])
    page.family(
        "pybgworker_worker_memory_bytes", "gauge",
        "Resident memory of live workers and of their children, summed.",
        [('part="worker"', sum(row.memory or 0 for row in alive)),
         ('part="children"', sum(child.memory for child in children))])
    left = store.departed_cpu()
    page.family(
        "pybgworker_worker_cpu_seconds_total", "counter",
        "CPU time of workers and of their children, summed; also of those that left.",
        [(f'part="{part}"', round(gone + sum(getattr(row, of) or 0 for row in rows), 3))
         for part, gone, of in (("worker", left[0], "cpu"),
                                ("children", left[1], "children_cpu"))])


def _add_schedules(page, rows):
    """Those of one name are one: the last success of any, the next tick of any."""
    names: dict[str, list] = {}
    for row in rows:
        if row.name in names or len(names) < _MOST_SCHEDULES:
            names.setdefault(row.name, []).append(row)
    page.family(
        "pybgworker_schedule_last_success_timestamp_seconds", "gauge",
        "Unix time; 0 before the first.",
        [(_labels(schedule=name), max(row.success_at or 0 for row in found) / 1000)
         for name, found in names.items()])
    next_ticks = {name: [row.next_tick for row in found if row.next_tick is not None]
                  for name, found in names.items()}
    page.family(
        "pybgworker_schedule_next_timestamp_seconds", "gauge",
        "Unix time of the next tick.",
        [(_labels(schedule=name), min(ticks))
         for name, ticks in next_ticks.items() if ticks])


def _add_database(page, store, now):
    page.family("pybgworker_last_task_id", "gauge",
                "Highest id given: its rate is the enqueue rate.",
                [("", store.last_id())])
    sizes = store.sizes()
    page.family("pybgworker_database_size_bytes", "gauge", "Size of the files.",
                [('file="main"', sizes.main), ('file="wal"', sizes.wal)])
    page.family("pybgworker_database_free_bytes", "gauge",
                "Bytes in the main file that are used before it grows.",
                [("", sizes.free)])
    page.family("pybgworker_history_age_seconds", "gauge",
                "Age of the newest flushed history of a live worker.",
                [("", age) for age in _history_age(store, now)])


def _history_age(store, now):
    """[seconds since the last minute ended in which a run did], if it is not too long.
    """
    for ms in (120_000, _HISTORY_LOOK_MS):
        rows = store.history(MINUTE, now - ms, until=now + 1, by="at")
        if rows:
            return [max(0, now / 1000 - rows[-1].at - MINUTE)]
    return []


# == Health ===================================================================
# Owns what machines ask of a worker, and of a queue: is it alive, is it ready?  The
# command `health` for scripts, HTTP for probes and scrapers, a datagram for systemd.
# Alive is a worker whose loop turns: no restart mends a database.

_STUCK_SECONDS = 10.0       # a loop that has not turned for so long is stuck
_SCRAPE_SECONDS = 1.0       # that an answer of /metrics serves others, too
_SCRAPE_LIMIT = 2.0         # … that its queries may take
_MOST_CONNECTIONS = 16      # at a time: for one more the eldest is shut
_REQUEST_SECONDS = 5.0      # that a client may be silent in a request
_PING_SECONDS = 1.0         # between two pings of a watchdog at least
_LAST_SECONDS = 10.0        # that a worker may take to end beyond its patience
_MOST_COUNTED = 10_000      # waiting tasks that `systemctl status` tells
_METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def readiness_of(store: Store) -> tuple[int, str]:
    """(HTTP status, one line) of a process that only reads a database."""
    try:
        with store.glance(_SCRAPE_LIMIT):
            store.last_id()
    except DatabaseUnavailable as exc:
        return 503, str(exc)
    return 200, "ok"


class Probes:
    """What is asked of one worker, from other threads than that of its loop."""

    def __init__(self, worker: Worker):
        self._worker = worker

    def health(self) -> tuple[int, str]:
        """(status, line): 200 while the loop turns, whatever the database does."""
        silent = time.monotonic() - health_of(self._worker).turned_at
        if silent > _STUCK_SECONDS:
            return 503, f"the worker's loop has not turned for {silent:.0f} s"
        return 200, "ok"

    def readiness(self) -> tuple[int, str]:
        """(status, line): 200 while it can be given tasks."""
        trouble = health_of(self._worker).trouble
        return (503, trouble) if trouble else self.health()


class Scrapes:
    """The answers of /metrics: one for all who ask within a second."""

    def __init__(self, store: Store, settings: types.SimpleNamespace):
        self._store, self._settings = store, settings
        self._lock = threading.Lock()
        self._until, self._answer = 0.0, (503, "")

    def answer(self) -> tuple[int, str]:
        """(status, text).  By a connection of its own, which does not stay open."""
        with self._lock:
            if time.monotonic() >= self._until:
                self._answer = self._scrape()
                self._until = time.monotonic() + _SCRAPE_SECONDS
            return self._answer

    def _scrape(self):
        try:
            with self._store.glance(_SCRAPE_LIMIT):
                now = self._store.now()
                return 200, metrics_text(self._store, self._settings, now)
        except DatabaseUnavailable as exc:
            return 503, f"{exc}\n"
        finally:
            self._store.close()


def is_loopback(host: str) -> bool:
    """True when only programs on this machine can reach what listens there."""
    import ipaddress

    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def has_token(authorization: str, token: str | None) -> bool:
    """True for the header `Authorization: Bearer TOKEN`, if there is a token."""
    import hmac

    given = authorization.encode("utf-8", "replace")
    return bool(token) and hmac.compare_digest(given, f"Bearer {token}".encode())


def probe_answers(probes: Probes, scrapes: Scrapes, is_local: bool,
                  token: str | None) -> Callable[[str, str], tuple[int, str, str]]:
    """A function (path, authorization) -> (status, content type, body).

    Who is not on this machine, and has no token, is told yes or no, and no reasons.
    """
    plain = "text/plain; charset=utf-8"

    def answer(path, authorization):
        is_trusted = is_local or has_token(authorization, token)
        if path == "/metrics":
            if is_trusted:
                status, text = scrapes.answer()
                return status, _METRICS_TYPE if status == 200 else plain, text
            return (401, plain, "Authorization: Bearer TOKEN is wanted\n") if token \
                else (403, plain, "set PYBGWORKER_WEB_TOKEN for who is elsewhere\n")
        probe = {"/healthz": probes.health, "/readyz": probes.readiness}.get(path)
        if probe is None:
            return 404, plain, "there are /metrics, /healthz and /readyz\n"
        status, line = probe()
        line = line.partition("\n")[0] if is_trusted or status == 200 else "no"
        return status, plain, f"{line}\n"

    return answer


def _handler_of(answer):
    """The class that speaks HTTP for these answers."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout, wbufsize = _REQUEST_SECONDS, -1        # one write for an answer
        server_version, sys_version = "pybgworker", ""

        def do_GET(self):
            path = self.path.partition("?")[0]
            authorization = self.headers.get("Authorization", "")
            status, kind, body = answer(path, authorization)
            data = body.encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_):
            """Requests are no events of a worker."""

    return Handler


class HttpServer:
    """Answers in threads, from open() to close(); the caller's does not wait."""

    def __init__(self, host: str, port: int, answer: Callable):
        self._address, self._answer = (host, port), answer
        self._lock = threading.Lock()
        self._open: dict = {}           # requests: the eldest is the first
        self._waker: Any = None         # a socket; closing it ends the thread
        self._thread: Any = None

    def open(self) -> int:
        """Listen; return the port.  Raises OSError: it is in use, or not ours."""
        server = self._server()
        ear, self._waker = socket.socketpair()
        self._thread = threading.Thread(
            target=self._serve, args=(server, ear), name="http", daemon=True)
        self._thread.start()
        return server.server_address[1]

    def _server(self):
        import socketserver

        outer, host = self, self._address[0]

        class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads, allow_reuse_address, request_queue_size = True, True, 64
            block_on_close, timeout = False, 0

            def get_request(self):
                try:
                    return super().get_request()
                except OSError as exc:
                    if is_lack(exc):        # it stays there, and would come again
                        own_sleep(0.1)
                    raise

            def process_request(self, request, client_address):
                outer._note(request)
                super().process_request(request, client_address)

            def shutdown_request(self, request):
                outer._forget(request)
                super().shutdown_request(request)

            def handle_error(self, request, client_address):
                if not isinstance(sys.exc_info()[1], OSError):     # it went away
                    super().handle_error(request, client_address)

        server = Server(self._address, _handler_of(self._answer))
        server.socket.setblocking(False)
        return server

    def _note(self, request):
        with self._lock:
            self._open[request] = None
            if len(self._open) > _MOST_CONNECTIONS:
                eldest = next(iter(self._open))
                del self._open[eldest]
                with contextlib.suppress(OSError):
                    eldest.shutdown(socket.SHUT_RDWR)

    def _forget(self, request):
        with self._lock:
            self._open.pop(request, None)

    def _serve(self, server, ear):
        with server, ear, selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            selector.register(ear, selectors.EVENT_READ)
            while True:
                heard = [key.fileobj for key, _ in selector.select()]
                if ear in heard:
                    return
                server.handle_request()

    def close(self) -> None:
        """Listen no more.  May be called twice."""
        if self._waker:
            self._waker.close()
            self._thread.join(1.0)
            self._waker = None


@chore
def http_chore(worker: Worker) -> Chore:
    """Answer probes and scrapers for as long as a worker runs, if it is to.

    Where it cannot listen, the worker ends before it has begun a task.
    """
    s = worker.settings
    if not s.http:
        return Chore(math.inf, nobody)
    host, _, port = s.http.rpartition(":")
    host = host.strip("[]")
    answer = probe_answers(Probes(worker), Scrapes(worker.store, s),
                           is_loopback(host), s.web_token)
    server = HttpServer(host, int(port), answer)
    try:
        found = server.open()
    except (OSError, OverflowError) as exc:
        why = getattr(exc, "strerror", None) or exc
        worker.house.trouble.fatal = f"--http {s.http}: {why}: name another port"
        return Chore(math.inf, nobody)
    worker.journal.say("http_start", host=host, port=found)
    return Chore(math.inf, nobody, close=server.close)


# What systemd is told: https://www.freedesktop.org/software/systemd/man/sd_notify


def notify_service(message: str) -> None:
    """Tell the service manager that has started us; never raises, nor waits."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] not in ("/", "@") or not hasattr(socket, "AF_UNIX"):
        return
    address = "\0" + path[1:] if path[0] == "@" else path      # an abstract one
    with contextlib.suppress(OSError), contextlib.closing(
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as sender:
        sender.setblocking(False)
        sender.sendto(message.encode("utf-8", "replace"), address)


def watchdog_seconds(environ: Any, pid: int) -> float | None:
    """How often this process has to say that its loop turns; None: nobody asks."""
    try:
        seconds = int(environ.get("WATCHDOG_USEC", "")) / 1e6
        meant = int(environ.get("WATCHDOG_PID", pid)) == pid
    except ValueError:
        return None
    return min(_PING_SECONDS, seconds / 2) if meant and seconds > 0 else None


class Service:
    """What systemd knows of a worker: that it is ready, turns, and stops."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self._is_ready = self._is_stopping = False      # as far as it was told
        self._ping = watchdog_seconds(os.environ, os.getpid())
        self._ping_due = self._status_due = 0.0

    def tell(self, now: int) -> None:
        """Say what is new; called in every turn of the loop."""
        worker, at, lines = self._worker, time.monotonic(), []
        if worker.is_ready and not self._is_ready:
            self._is_ready, self._status_due = True, 0.0
            lines.append("READY=1")
        if worker.senses.stops.count and not self._is_stopping:
            self._is_stopping = True
            lines.append("STOPPING=1")
        if at >= self._ping_due:
            self._ping_due = at + (self._ping or _PING_SECONDS)
            lines += ["WATCHDOG=1"] if self._ping else []
            if self._is_stopping:
                left = max(0.0, worker.stop_by - at) + _LAST_SECONDS
                lines.append(f"EXTEND_TIMEOUT_USEC={left * 1e6:.0f}")
        if at >= self._status_due:
            self._status_due = at + worker.settings.heartbeat_interval
            lines.append(f"STATUS={service_status(worker)}")
        if lines:
            notify_service("\n".join(lines))


def service_status(worker: Worker) -> str:
    """What `systemctl status` shows: 7 of 8 busy, 4,120 waiting."""
    busy = sum(any(slot.run for slot in member.slots())
               for member in worker.pool.members)
    text = f"{busy} of {worker.settings.concurrency} busy"
    with contextlib.suppress(DatabaseUnavailable):      # then that is said elsewhere
        waiting = worker.store.count(Filter(state=QUEUED), at_most=_MOST_COUNTED)
        more = "more than " if waiting >= _MOST_COUNTED else ""
        text += f", {more}{waiting:,} waiting"
    return text if worker.is_ready else f"starting: {text}"


@chore
def service_chore(worker: Worker) -> Chore:
    """Tell the service manager how the worker does, if one has started it."""
    if not os.environ.get("NOTIFY_SOCKET"):
        return Chore(math.inf, nobody)
    return Chore(0.0, Service(worker).tell)


# The command.


def _max_age(text):
    queue, _, limit = text.rpartition("=")
    if not queue:
        raise ValueError("QUEUE=T, such as mail=5m")
    return queue, parse_grace(limit)


_WINDOWS = {"m": MINUTE, "h": 3600, "d": DAY}


def _max_failed(text):
    found = re.fullmatch(r"(\d{1,9})/([mhd])", text)
    if not found:
        raise ValueError("a number in a minute, an hour or a day: 5/m, 20/h, 100/d")
    return int(found[1]), found[2]


def health_report(store: Store, now: int, worker_timeout: float,
                  worker: str | None = None, max_ages: Sequence[tuple] = (),
                  max_failed: tuple | None = None) -> dict:
    """Whether all is well, as one line and as figures; never raises for a database.

    `max_ages` are (queue, seconds), `max_failed` (number, m, h or d).
    """
    report: dict = {"ok": False, "say": "", "problems": [], "workers": 0}
    try:
        problems = _worker_problems(store, now, worker_timeout, worker, report)
        if max_ages:
            problems += _age_problems(store, now, max_ages, report)
        if max_failed:
            problems += _failure_problems(store, now, max_failed, report)
    except DatabaseUnavailable as exc:
        problems = [str(exc)]
    say = "; ".join(problems) or _well(report)
    return {**report, "ok": not problems, "say": say, "problems": problems}


def _well(report):
    workers = report["workers"]
    return f"ok: {workers} worker{'s' * (workers != 1)}, {report['busy']} of " \
        f"{report['children']} children busy"


def _worker_problems(store, now, worker_timeout, name, report):
    judge = judge_of(store)
    rows = [row for row in store.workers() if name is None or row.name == name]
    states = [worker_state(row, judge(row), now, worker_timeout) for row in rows]
    live = [row for row, state in zip(rows, states) if state == "live"]
    ids = {row.id for row in live}
    report["workers"] = len(live)
    report["children"] = sum(row.concurrency for row in live)
    report["busy"] = sum(
        child.running > 0 for child in store.children() if child.worker in ids)
    if live:
        return [f"{row.name} {row.note}" for row in live if row.note]
    if rows:
        return [f"{row.name} is {state}" for row, state in zip(rows, states)][-3:]
    return ["no worker runs" if name is None else f"no worker named {name} runs"]


def _age_problems(store, now, max_ages, report):
    rows = {row.name: row for row in store.queues(now)}
    problems, report["ages"] = [], {}
    for queue, limit in max_ages:
        row = rows.get(queue) or QueueRow(queue)
        since = now if row.oldest_at is None else row.oldest_at
        age = report["ages"][queue] = max(0, now - since) / 1000
        if age > limit:
            paused = ", and is paused" if row.paused_at is not None else ""
            problems.append(f"queue {queue}: its oldest task waits for {span(age)}, "
                            f"at most {span(limit)} is allowed{paused}")
    return problems


def _failure_problems(store, now, max_failed, report):
    most, unit = max_failed
    seconds = _WINDOWS[unit]
    rows = store.history(QUARTER if unit == "d" else MINUTE, now - seconds * 1000,
                         until=now + 1, by="at")
    failed = report["failed"] = sum(row.failed for row in rows)
    if failed <= most:
        return []
    word = {"m": "minute", "h": "hour", "d": "day"}[unit]
    return [f"{failed:,} tasks failed in the last {word}, at most {most:,} may"]


@command("health", "say in one line whether workers do their work: status 0, else 1",
         "health --max-age mail=5m --max-failed 20/h",
         flag("--worker", metavar="NAME", help="only this one (default: any)"),
         flag("--max-age", metavar="QUEUE=T", type=typed(_max_age), action="append",
              default=[], help="the oldest task that may run there waits for no "
              "longer: 90s, 5m, 1h; may be given several times (default: no limit)"),
         flag("--max-failed", metavar="N/h", type=typed(_max_failed),
              help="no more tasks failed for good in the last m, h or d (default: no "
              "limit)"), reads=True)
def _health(args, app):
    report = health_report(
        app.store, app.store.now(), app.settings.worker_timeout, args.worker,
        args.max_age, args.max_failed)
    print_text(json.dumps(report, indent=2) if args.json else visible(report["say"]))
    return 0 if report["ok"] else 1


# == Listeners ================================================================
# Owns App.on(): functions that hear of runs that ended, in a child, as tasks of
# their own that are committed with the end.  Whoever reaps a dead worker's run has
# them told, too.


class TaskEvent:
    """What a listener hears: how one run of a task has ended.

    `.kind` is what it listens to, `.id`, `.name`, `.queue` are the task's, `.attempt`
    is the run's number, `.error` a TaskError or None, `.worker` the name of its
    worker, `.at` an aware datetime, `.meta` the dict of options(meta=).
    """

    def __init__(self, about: dict, store: Store):
        error = about.get("error")
        self.kind, self.id, self.name = about["kind"], about["id"], about["name"]
        self.queue, self.attempt = about["queue"], about["attempt"]
        self.error = TaskError(error) if error else None
        self.worker = about["worker"]
        self.at = datetime.fromtimestamp(about["at"] / 1000, timezone.utc)
        self.meta = about.get("meta") or {}
        self._store = store

    def __repr__(self) -> str:
        error = f" {self.error}" if self.error else ""
        return f"<{self.kind} of task {self.id} {self.name}, run {self.attempt}{error}>"

    def first_in(self, seconds: float) -> bool:
        """True for the first of its kind, task name and error type in so long.

        On all workers of the database, so that a storm of failures is one message.
        A listener that has failed and is run again is as first as it was.
        """
        run = current_task()
        if run is not None and run.attempt > 1:
            return True
        error = self.error and (self.error.type or self.error.kind)
        what = [self.kind, self.name, error]
        return self._store.is_first(to_json(what), to_ms(seconds), self._store.now())


def listening(app: App, kind: str) -> Callable[[Callable], Callable]:
    """The decorator that App.on() promises."""
    if kind not in LISTENED:
        raise OptionError(f"on({kind!r}): must be {', '.join(LISTENED)}")

    def listen(fn):
        if not callable(fn) or does_yield(fn):
            raise OptionError(f"on({kind!r}) of {fn!r}: must be a function that does "
                              "not yield")
        others = [f for f in app.listeners.get(kind, ())
                  if default_name(f) != default_name(fn)]      # reloaded, mostly
        app.listeners[kind] = [*others, fn]
        task: Task = Task(app, _teller(app, kind), "on", {})
        task.name = f"on:{kind}"
        app.tasks[task.name] = task
        return fn

    return listen


def _teller(app, kind):
    """The function of the task that tells the listeners of a kind.

    Several are told by a task each, so that one that fails is told again alone.
    """
    async def wait_for(coroutine):
        await coroutine

    def tell(about, only=None):
        listeners = {default_name(fn): fn for fn in app.listeners[kind]}
        if only is None and len(listeners) > 1:
            each = app.tasks[f"on:{kind}"].options(queue=about["queue"])
            each.delay_many([(about, name) for name in listeners])
            return None
        if only is not None and only not in listeners:      # of an older program
            return None
        fn = listeners[only] if only else next(iter(listeners.values()))
        value = fn(TaskEvent(about, app.store))
        return wait_for(value) if isinstance(value, types.CoroutineType) else None

    return tell


# == Bench ====================================================================
# Owns `bench`: what this machine does, measured beside raw SQLite on the same file
# system in the same run.  Raw means the same table, columns and durability, by the
# shortest code there is; each round does both, for disks drift.  The only section
# outside of Book Two that holds SQL: that of the raw side.

_ROUNDS = 9                 # ours and raw in turn: disks drift
_SINGLES = 100              # durable inserts in a round, one by one
_THREADS = 8                # that call delay() at the same time
_CLAIM_BATCH = 100          # rows in one transaction of the raw claim + ack
_LATENCY_CALLS = 150
_CHILDREN = 2               # … of the rows about waiting tasks
_APP_SOURCE = '''
import sys
sys.path += [path for path in {path!r} if path not in sys.path]
from {module} import App
app = App(db={db!r}, concurrency={concurrency}, durability="full")

@app.task(name="noop")
def noop(*payload):
    pass

@app.task(name="clock")
def clock():
    import time
    return time.time()

@app.task(name="once", retries=0)
def once(*payload):
    pass

@app.task(name="nap")
def nap(seconds):
    import time
    time.sleep(seconds)

@app.task(name="wait")
async def wait(seconds):
    import asyncio
    await asyncio.sleep(seconds)
'''
_BENCH_NOTE = (
    "raw sqlite: the same rows by the shortest code there is: insert + commit; "
    "executemany; claim\nand acknowledge 100 in a transaction.  limited by: what "
    "took this share of the time.\nBeside tasks that wait: what places that are "
    "never empty would do."
)


class _Waiting(NamedTuple):
    """Tasks that wait, and the places that a worker has for them."""

    task: str
    total: int
    seconds: float          # that each waits
    children: int
    each: int               # places in a child
    flag: str               # of `run`, for more than one

    @property
    def places(self):
        """Over all children."""
        return self.children * self.each

    def text(self):
        """What it is, for people."""
        where = f"{self.each} {self.flag[2:]} in each of " * (self.each > 1)
        kind = "async tasks" * (self.task == "wait") or "tasks"
        return f"{kind} of {span(self.seconds)}, {where}{self.children} children"


_WAITING = {
    "ordinary_per_second": _Waiting("nap", 4800, 0.01, 16, 1, ""),
    "in_threads_per_second": _Waiting("nap", 2560, 0.1, _CHILDREN, 32, "--threads"),
    "coroutines_per_second":
        _Waiting("wait", 4000, 0.1, _CHILDREN, 100, "--coroutines"),
}
_RAW_INSERT = """
    insert into bg_task (name, queue, priority, key, retries, timeout, state, run_at,
        created_at, tick, args)
    values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""


def _timed(count, act):
    """(how many a second, the share of the time that this process computed)."""
    start, computed = time.perf_counter(), time.process_time()
    act()
    seconds = time.perf_counter() - start
    return count / seconds, (time.process_time() - computed) / seconds


def _middle(values):
    return sorted(values)[len(values) // 2]


def _raw(path):
    """A plain connection to a database that has our schema."""
    SqliteStore(path).create()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("pragma synchronous = full")
    return connection


def _raw_row(args):
    now = now_ms()
    return "noop", "default", 5, None, 3, None, QUEUED, now, now, None, args


def _raw_many(connection, count, args):
    connection.execute("begin immediate")
    connection.executemany(_RAW_INSERT, [_raw_row(args) for _ in range(count)])
    connection.execute("commit")


def _raw_singles(connection, count, args):
    for _ in range(count):
        connection.execute("begin immediate")
        connection.execute(_RAW_INSERT, _raw_row(args))
        connection.execute("commit")


def _raw_claim_and_ack(connection):
    """Move every queued row to success, 100 in a transaction."""
    while True:
        connection.execute("begin immediate")
        rows = connection.execute(
            f"""select id, name, queue, attempt, retries, timeout, run_at, args
                from bg_task
                where state = {QUEUED} and alone = 0
                    and queue = 'default' and name = 'noop'
                order by priority, id limit ?""", (_CLAIM_BATCH,),
        ).fetchall()
        now = now_ms()
        connection.executemany(
            f"""update bg_task set state = {RUNNING}, worker = ?, attempt = ?,
                    started_at = ?
                where id = ?""", [(1, 1, now, row[0]) for row in rows],
        )
        connection.executemany(
            f"""update bg_task set state = {SUCCESS}, started_at = ?, finished_at = ?,
                    duration = ?, result = ?
                where id = ? and state = {RUNNING} and worker = ? and attempt = ?""",
            [(now, now, 0.001, "null", row[0], 1, 1) for row in rows],
        )
        connection.execute("commit")
        if not rows:
            return


class _Place:
    """A temporary folder with an app module in it, and a worker for it."""

    def __init__(self, folder, concurrency, payload):
        import tempfile

        self.call = ("x" * payload,) if payload else ()     # arguments of each task

        self.folder = tempfile.mkdtemp(prefix="pybgworker-bench-", dir=folder)
        self.db = os.path.join(self.folder, "bench.db")
        self.app = App()
        # Before the environment: it may name a database that is in use.
        self.app.override(db=self.db, durability="full")
        self.noop = self.stand_in("noop")
        self.clock = self.stand_in("clock")
        source = _APP_SOURCE.format(
            path=sys.path, module=__name__, db=self.db, concurrency=concurrency
        )
        with open(os.path.join(self.folder, "bench_app.py"), "w") as f:
            f.write(source)

    def stand_in(self, name, **options):
        """What enqueues a task of the app by its name."""
        return Task(self.app, do_nothing, name, options)

    def burst(self, *flags):
        """Run a worker until all is done; return CPU seconds: its own, children's."""
        return self.end(self.worker("--burst", *flags))

    def end(self, worker):
        """Wait for the end of a worker; the same."""
        if worker.wait() != 0:
            raise PyBgWorkerError("bench: the worker failed")
        with open(os.path.join(self.folder, "log.jsonl"), encoding="ascii") as log:
            *_, last = log
        stopped = json.loads(last)
        return stopped["cpu"], stopped["children_cpu"]

    def worker(self, *flags):
        """Start a worker; its log goes to a file."""
        import subprocess

        code = (
            f"import sys; sys.path[:] = [{self.folder!r}, *{sys.path!r}]; "
            f"from {__name__} import main; "
            f"sys.exit(main(['run', '--app', 'bench_app:app', *{flags!r}]))"
        )
        environ = {
            k: v for k, v in os.environ.items() if not k.startswith("PYBGWORKER_")
        }
        with open(os.path.join(self.folder, "log.jsonl"), "wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code], cwd=self.folder, env=environ, stdout=log,
            )

    def remove(self):
        import shutil

        self.app.store.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _measure_enqueue(place, raw, tasks):
    """delay() and delay_many() against the same inserts, round by round."""
    count, args = tasks // _ROUNDS, encode_call(place.call, {})
    rounds, logs = [], []
    for _ in range(_ROUNDS):
        rounds.append((
            _timed(_SINGLES, lambda: _raw_singles(raw, _SINGLES, args)),
            _timed(_SINGLES, lambda: _call_often(place, _SINGLES)),
            _timed(_SINGLES * _THREADS, lambda: _call_in_threads(place)),
            _timed(count, lambda: _raw_many(raw, count, args)),
            _timed(count, lambda: place.noop.delay_many([place.call] * count)),
        ))
        logs.append([os.path.getsize(os.path.join(place.folder, name))
                     for name in ("bench.db-wal", "raw.db-wal")])
    raw_one, one, threads, raw_many, many = (_middle(found) for found in zip(*rounds))
    return {
        "delay_per_second": _figure(one, raw_one, _limit_of_caller(one)),
        "threads_per_second": _figure(threads, raw_one, _limit_of_caller(threads)),
        "delay_many_per_second": _figure(many, raw_many, _limit_of_caller(many)),
        "wal_bytes": logs[-1][0],
        "wal": _state_of_logs(logs),
    }


def _state_of_logs(logs):
    """Whether each was made longer in the second half of the rounds.

    A commit that lengthens its log takes longer than one that overwrites it.
    """
    half, end = logs[len(logs) // 2], logs[-1]
    return {name: "lengthened" if after > before else "overwritten"
            for name, before, after in zip(("ours", "raw"), half, end)}


def _call_often(place, count):
    for _ in range(count):
        place.noop.delay(*place.call)


def _call_in_threads(place):
    threads = [
        threading.Thread(target=_call_often, args=(place, _SINGLES))
        for _ in range(_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _figure(ours, raw, limit):
    """A rate as it is reported, from two results of _timed()."""
    return {"ours": round(ours[0], 1), "raw": round(raw[0], 1),
            "ratio": round(ours[0] / raw[0], 3), "limit": limit}


def _limit_of_caller(timed):
    busy = timed[1]
    return f"caller CPU {busy:.0%}" if busy > 0.5 else f"fsync {1 - busy:.0%}"


def _measure_drain(place):
    """What is queued, from the first start to the last finish: (a second, limit)."""
    store = place.app.store
    queued = sum(count for *_, state, count in store.counts() if state == QUEUED)
    store.pause("default", now_ms())
    before = place.burst()              # what starting and stopping costs
    store.resume("default")
    after = place.burst()
    left = sum(count for *_, state, count in store.counts() if state not in FINISHED)
    if left:
        raise PyBgWorkerError(f"bench: {left} of {queued} tasks were not done")
    rows = store.finished_runs(queued)
    first = min(row.started_at or 0 for row in rows)
    seconds = max(0.001, (max(row.finished_at for row in rows) - first) / 1000)
    worker, children = (max(0.0, b - a) / seconds for a, b in zip(before, after))
    limit = _limit_of_worker(worker, children, place.app.settings.concurrency)
    return len(rows) / seconds, limit


def _measure_throughput(place, raw):
    """No-op tasks, by a worker and by a raw claim and acknowledge."""
    rate, limit = _measure_drain(place)
    left, = raw.execute(
        f"""select count(*) from bg_task where state = {QUEUED} and alone = 0"""
    ).fetchone()
    theirs = _timed(left, lambda: _raw_claim_and_ack(raw))
    return _figure((rate, 0), theirs, limit)


def _limit_of_worker(worker, children, concurrency):
    """By the share of the time that each computed; 1.0 is one CPU."""
    each = children / min(concurrency, os.cpu_count() or 1)
    if max(worker, each) < 0.6:
        return f"fsync {1 - max(worker, each):.0%}"
    if worker >= each:
        return f"worker CPU {min(1, worker):.0%}"
    return f"child CPU {min(1, each):.0%}"


def _measure_waiting(place, kind, most):
    """Tasks that sleep, against as many places that are never empty."""
    count = min(kind.total, most)
    flags = ["--concurrency", str(kind.children)]
    if kind.each > 1:
        flags += [kind.flag, str(kind.each)]
    idle, _ = place.burst(*flags)
    task = place.stand_in(kind.task)
    task.delay_many([(kind.seconds,)] * count)
    computed, _ = place.burst(*flags)
    rows = place.app.store.finished_runs(count)
    ends = sorted(row.started_at / 1000 + row.duration for row in rows)
    # All children have started by the half; at the very end not all have work.
    first, last = count // 2, int(count * 0.95)
    rate = (last - first) / max(0.001, ends[last] - ends[first])
    limit = f"worker CPU {span(max(0.0, computed - idle) / count)} a task"
    return _figure((rate, 0), (kind.places / kind.seconds, 0), limit)


def _measure_latency(place, disk):
    """An idle worker: from delay() to the task's first line, and to its result."""
    idle, _ = place.burst()
    worker = place.worker()
    try:
        for _ in range(10):
            place.clock.delay().get(timeout=30)     # warm
        picked, got = [], []
        for _ in range(_LATENCY_CALLS):
            start, clock = time.time(), time.perf_counter()
            first_line = place.clock.delay().get(timeout=30)
            got.append(time.perf_counter() - clock)
            picked.append(max(0.0, first_line - start))
            time.sleep(0.005)
    finally:
        worker.terminate()
        computed, _ = place.end(worker)
    each = max(0.0, computed - idle) / (_LATENCY_CALLS + 10)
    return {"pick_up_seconds": _spread(picked, disk, 1),
            "get_seconds": _spread(got, disk, 2), "cpu_of_one_task": round(each, 6)}


def _spread(values, disk, syncs):
    """p50 and p99, and the part that is `syncs` waits of `disk` seconds."""
    values = sorted(values)
    middle, most = (percentile(values, part) or 0.0 for part in (0.5, 0.99))
    return {
        "p50": round(middle, 6), "p99": round(most, 6),
        "limit": f"fsync {min(1, syncs * disk / middle):.0%}",
    }


def bench_report(tasks: int = 20000, concurrency: int = 2, payload: int = 0,
                 folder: str | None = None) -> dict:
    """Measure in a temporary folder inside `folder`; return figures and ratios.

    `payload`: bytes of arguments for each task.  "limit" says what bounds a figure:
    a CPU, or waiting for the disk, with its share of the time.
    """
    place = _Place(folder, concurrency, payload)
    try:
        raw = _raw(os.path.join(place.folder, "raw.db"))
        report = {
            "version": __version__, "python": sys.version.split()[0],
            "sqlite": sqlite3.sqlite_version, "cpus": os.cpu_count(),
            "tasks": tasks, "concurrency": concurrency, "payload": payload,
            "durability": "full", **_measure_enqueue(place, raw, tasks),
        }
        disk = 1 / report["delay_per_second"]["raw"]
        report["tasks_per_second"] = _measure_throughput(place, raw)
        place.stand_in("once", retries=0).delay_many([place.call] * tasks)
        rate, limit = _measure_drain(place)
        theirs = report["tasks_per_second"]["raw"]
        report["once_per_second"] = _figure((rate, 0), (theirs, 0), limit)
        for name, kind in _WAITING.items():
            report[name] = _measure_waiting(place, kind, tasks)
        report.update(_measure_latency(place, disk))
        raw.close()
        return report
    finally:
        place.remove()


def bench_text(report: dict) -> str:
    """The report as a table, ours beside raw SQLite."""
    head = (
        f"pybgworker {report['version']}, Python {report['python']}, SQLite "
        f"{report['sqlite']}, {report['cpus']} CPUs, {report['concurrency']} children, "
        f"payload {report['payload']}, durability {report['durability']}, the callers' "
        f"-wal grew to {report['wal_bytes'] / 1e6:.1f} MB"
    )
    names = {
        "delay_per_second": "delay(), durable, a second",
        "threads_per_second": f"delay() from {_THREADS} threads, a second",
        "delay_many_per_second": "delay_many(), a second",
        "tasks_per_second": "no-op tasks, a second",
        "once_per_second": "no-op tasks with retries=0, a second",
        **{key: kind.text() for key, kind in _WAITING.items()},
    }
    rows = [
        {"what": text, "ours": f"{report[key]['ours']:,.0f}",
         "raw sqlite": f"{report[key]['raw']:,.0f}",
         "ratio": f"{report[key]['ratio']:.2f}", "limited by": report[key]["limit"]}
        for key, text in names.items()
    ]
    latencies = {
        "pick_up_seconds": "delay() to the task's first line, idle worker",
        "get_seconds": "delay().get(), idle worker",
    }
    rows += [
        {"what": text, "ours": f"p50 {span(report[key]['p50'])}",
         "raw sqlite": f"p99 {span(report[key]['p99'])}",
         "ratio": "", "limited by": report[key]["limit"]}
        for key, text in latencies.items()
    ]
    rows.append({"what": "worker CPU of a task that comes alone",
                 "ours": span(report["cpu_of_one_task"])})
    columns = ["what", "ours", "raw sqlite", "ratio", "limited by"]
    logs = "; ".join(f"{name}: {state}" for name, state in report["wal"].items())
    return f"{head}\n\n{table(rows, columns)}\n\n{_BENCH_NOTE}\nThe -wal of {logs}."


@command("bench", "measure this machine, beside raw SQLite", "bench --tasks 20000",
         flag("--tasks", metavar="N", type=typed(parse_count), default=20000,
              help="no-op tasks to run (default: 20000)"),
         flag("--concurrency", metavar="N", type=typed(parse_children), default=2,
              help="children, 1 to 1,000 (default: 2)"),
         flag("--payload", metavar="BYTES", type=typed(parse_bytes), default=0,
              help="arguments of each task: 200, 10k; a bare number is bytes "
              "(default: none)"), reads=True)
def _bench(args, app):
    folder = os.path.dirname(app.store.path)
    report = bench_report(args.tasks, args.concurrency, args.payload, folder)
    return json.dumps(report, indent=2) if args.json else bench_text(report)


# == Old import paths =========================================================
# pybgworker was a package before it was one file.  Each of its submodule names
# still imports, and is this module: sys.modules is all that
# `from pybgworker.task import task` consults (the same trick gives os its
# os.path).  `-m pybgworker.cli` needs more: runpy asks for a spec with code to
# run, so cli is a real module whose spec is this file.  New code: import
# everything from pybgworker.

_OLD_SUBMODULES = (
    "backends", "cancel", "config", "dead", "failed", "inspect", "logger", "progress",
    "purge", "queue", "ratelimit", "result", "retry", "scheduler", "sqlite_queue",
    "state", "stats", "task", "utils", "worker",
)


def _keep_old_import_paths():
    this = sys.modules.get(__name__)
    if this is None:                    # loaded by hand, not imported
        return
    for name in _OLD_SUBMODULES:
        sys.modules[f"{__name__}.{name}"] = this
        globals().setdefault(name, this)
    cli = types.ModuleType(f"{__name__}.cli", "The old home of main().")
    cli.main, cli.__path__ = main, []   # type: ignore[attr-defined]
    cli.__spec__ = importlib.util.spec_from_file_location(cli.__name__, __file__)
    sys.modules[cli.__name__] = this.cli = cli      # type: ignore[attr-defined]


def _exec_as_module():
    """Start this script again as a module: that uses the compiled file.

    A worker that has compiled all of its source keeps twice the memory for good.
    A signal that asks for a stop waits meanwhile.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
    folder = os.path.dirname(os.path.abspath(__file__))
    code = (
        f"import sys; sys.path[0] = {folder!r}; "
        "import pybgworker; sys.exit(pybgworker._main_of_worker())"
    )
    os.execv(sys.executable, [*interpreter(), "-c", code, *sys.argv[1:]])


def _main_of_worker():
    """main(), where _exec_as_module() goes on."""
    with quitting_at_once():        # here arrives a signal that has waited
        pass
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stop_signals())
    return main()


if __name__ == "__main__":
    # The app imports this file as "pybgworker"; a second copy called __main__
    # would have a second, empty registry.  So hand over to the copy that the app
    # will import.  Not a plain __spec__: under pdb that is the builtins' one.
    _spec = globals().get("__spec__")
    if _spec is None and sys.argv[1:2] == ["run"] and fcntl is not None \
            and not (sys.gettrace() or sys.getprofile()):     # pdb, coverage
        _exec_as_module()
    _own = importlib.import_module(_spec.name if _spec else "pybgworker")
    if _signal.getsignal(_signal.SIGINT) == _signal.SIG_DFL:
        _signal.signal(_signal.SIGINT, _signal.default_int_handler)
    sys.exit(_own.main())

_keep_old_import_paths()
