"""Runs Python that a language model wrote, and survives it.

    run("print(6 * 7)")                      -> Result(ok=True, stdout='42\\n', error=None)
    run("1 / 0").error                       -> 'ZeroDivisionError: division by zero'
    run_many([code, (code, stdin), ...])     -> one Result each, in order

A call into C such as `7 ** 60 ** 60` never returns to the interpreter, so no exception, signal
handler or thread of the same process can stop it; SIGKILL from another process can. Hence three
floors. The caller talks to a few *workers*: bare interpreters, started once. A worker forks one
*child* per program (0.5 ms: no torch inside), watches it, and kills it at the deadline. Whatever a
program breaks, it breaks in a process that is thrown away.

What a program meets; in brackets who enforces it: L a resource limit, S a seccomp filter in the
kernel (Linux on x86-64 and arm64; it binds root too), A a Python audit hook, W the worker.
- time: `timeout` s on the wall [W]; half of that, in whole seconds, at least 1, of CPU time [L]
- 256 MiB of address space, 16 open files, no core dump [L]; 64 KiB of output, then death [W]
- no second process, no signal to another one, no network [A S]; no thread [S]; no ctypes [A]
- no writing, deleting or renaming of files [A, L or S]; no reading outside the standard library [A]
- an empty environment, an empty directory, the same `random` numbers and hashes in every run
Elsewhere (macOS) S is missing: threads start (they die with their program), A guards the rest
alone, and the kernel may ignore the address-space limit.

NOT defended: this guards against the accidents of a small model; it is no boundary against an
attacker. An audit hook can be fooled from inside the process, os.stat still sees which files exist,
and a program that shares its text with the lines that test it can forge what they print. For code
from strangers use a virtual machine.
"""
import atexit, gc, io, marshal, math, mmap, os, resource, select, signal, struct, sys  # noqa: E401
import time
from _thread import RLock  # not `threading`: what the worker imports, every fork of it pays for
from collections import namedtuple
from contextlib import suppress

TIMEOUT = 2.0  # seconds of wall time for one program
MEMORY = 256 << 20  # bytes of address space, the interpreter's own 20 MiB included
OUTPUT = 64 << 10  # bytes of standard output
GRACE = 5.0  # seconds after the deadline at which the worker itself counts as stuck


class Result(namedtuple("Result", "ok stdout error")):
    """ok: ran to its end, or left by sys.exit(0). error: None or one line: 'ErrorName: message',
    'timeout', 'memory', 'output' (too much), 'killed' (any other death, as by os._exit)."""

    __slots__ = ()


# --- the caller's side ----------------------------------------------------------------------------


def run(code, stdin="", timeout=TIMEOUT):
    """Run one program -> Result. See `run_many`."""
    return run_many([(code, stdin)], timeout, workers=1)[0]


def run_many(programs, timeout=TIMEOUT, workers=None):
    """Run programs, each a str or a pair (code, stdin), -> a list of Result in the same order.

    timeout: seconds of wall time for each. workers: how many run at once; by default the usable
    cores, at most 4. The workers stay for the next call. Safe to call from several threads: calls
    queue up. What a program does never raises here; TypeError and ValueError are for wrong
    arguments, RuntimeError for a worker that cannot be started.
    """
    jobs = [(p, "") if isinstance(p, str) else tuple(p) for p in programs]
    if not all(len(job) == 2 and all(isinstance(text, str) for text in job) for job in jobs):
        raise TypeError("a program is a str or a pair of them, (code, stdin)")
    if not (timeout > 0 and (workers is None or workers > 0)):
        raise ValueError(f"timeout {timeout} and workers {workers} must be positive")
    results, deaths, team = [None] * len(jobs), [0] * len(jobs), []
    todo = list(range(len(jobs)))[::-1]  # pop() takes the first
    with _lock:
        try:
            while todo or any(worker.job is not None for worker in team):
                team = _team(min(workers or _usable_cores(), len(jobs)))
                for worker in team:
                    if worker.job is None and todo:
                        worker.ask(todo.pop(), jobs, timeout)
                for worker, result in _answers(team):
                    job, worker.job = worker.job, None
                    if result is None:  # the worker is dead, by this program or by an accident:
                        worker.stop()
                        _pool.remove(worker)
                        deaths[job] += 1
                        if deaths[job] == 1:  # so it gets a second try
                            todo.append(job)
                            continue
                    results[job] = result or Result(False, "", "killed")
        except BaseException:  # Ctrl-C above all: keep no worker in the middle of a conversation
            close()
            raise
    return results


class _Worker:
    """A worker process as its caller sees it. `job` is the index of its program, None when idle."""

    def __init__(self):
        import subprocess, tempfile  # noqa: E401  (here: the worker is this file too)

        self.job, self.deadline, self.folder = None, 0.0, tempfile.mkdtemp(prefix="sandbox-")
        # -S -s: no site-packages; not -I, which would ignore PYTHONHASHSEED. `keep` may be what the
        # interpreter itself needs to start; the worker then empties its environment.
        keep = {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "PYTHONHOME")}
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", "-X", "utf8", os.path.abspath(__file__)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=self.folder,
            env={**keep, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C in the terminal reaches the caller only
        )
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()

    def ask(self, job, jobs, timeout):
        self.job, self.deadline = job, time.monotonic() + timeout + GRACE
        with suppress(BrokenPipeError):  # dead: its reply will be an end of file
            _send(self.requests, (*jobs[job], timeout))

    def stop(self):
        with suppress(OSError):  # its group is itself and the program it is running
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.stdin.close(), self.process.stdout.close(), self.process.wait()
        with suppress(OSError):
            os.rmdir(self.folder)


_pool, _lock = [], RLock()  # re-entrant: a Ctrl-C during run_many calls close()


def _usable_cores():
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return min(4, len(cores))


def _team(size):
    """The first `size` workers of the pool, which grows to that size."""
    new = [_Worker() for _ in range(size - len(_pool))]  # they start side by side
    _pool.extend(new)
    for worker in new:
        if not _receive(worker.replies):
            raise RuntimeError(f"the sandbox cannot start {sys.executable}; its message is above")
    return _pool[:size]


def _answers(team):
    """Wait for the first answers -> [(worker, Result, or None if the worker died)]."""
    busy = {worker.replies: worker for worker in team if worker.job is not None}
    poll = select.poll()  # not select(), which fails for descriptors above 1023
    for pipe in busy:
        poll.register(pipe, select.POLLIN)
    patience = min(worker.deadline for worker in busy.values()) - time.monotonic()
    ready = [busy[pipe] for pipe, _ in poll.poll(max(0, math.ceil(patience * 1000)))]
    if not ready:  # a worker that answers nothing is as good as dead
        return [(w, None) for w in busy.values() if w.deadline <= time.monotonic()]
    answers = [(worker, _receive(worker.replies)) for worker in ready]
    return [(worker, answer and Result(*answer)) for worker, answer in answers]


def close():
    """Stop all workers, and what they are running. The next `run` starts new ones."""
    with _lock:
        while _pool:
            _pool.pop().stop()


def _forget():
    """In a forked copy of the caller: the workers belong to the parent, let go of their pipes."""
    global _lock
    for worker in _pool:
        worker.process.stdin.close(), worker.process.stdout.close()
        worker.process.returncode = 0  # nobody here may wait for it
    _pool.clear()
    _lock = RLock()


# --- both sides: one message is its length in 8 bytes, then itself in `marshal` format ------------


def _send(pipe, message):
    data = marshal.dumps(message)
    data = memoryview(len(data).to_bytes(8, "little") + data)
    while data:
        data = data[os.write(pipe, data) :]


def _receive(pipe):
    """-> the message, or None when the other side is gone."""
    data, size = b"", 8
    while len(data) < size:
        part = os.read(pipe, 65536)
        if not part:
            return None
        data += part
        if len(data) >= 8:
            size = 8 + int.from_bytes(data[:8], "little")
    return marshal.loads(data[8:])


# --- the worker -----------------------------------------------------------------------------------


def _serve():
    """The worker's life: receive a program on descriptor 0, run it in a child, reply on 1."""
    os.register_at_fork = lambda **_: None  # or else `random` seeds itself anew in each child
    import builtins, random  # noqa: E401

    del sys.path[0]  # the folder of this file
    sys.argv, builtins.exit, builtins.quit = [""], sys.exit, sys.exit
    os.environ.clear()
    random.seed(0)
    main = sys.modules["__main__"] = type(sys)("__main__")  # the programs', each in its own copy
    for name, most in dict(AS=MEMORY, FSIZE=0, CORE=0, NOFILE=16).items():  # for its children, too
        with suppress(ValueError, OSError):  # macOS refuses some; a lower one may be in force
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    seal, null = _seal(), os.open(os.devnull, os.O_RDWR)
    report = mmap.mmap(-1, 1024)  # shared with the child: 1, then its error, once it has ended
    gc.collect(), gc.freeze()  # children then copy fewer pages
    _send(1, "ready")
    try:
        while (request := _receive(0)) is not None:
            code, stdin, timeout = request
            cpu = max(1, math.ceil(timeout / 2))  # s
            report[:] = bytes(1024)
            output, into = os.pipe()
            child = os.fork()
            if child == 0:
                _child(code, stdin, cpu, (null, into, null), main, report, seal)  # never returns
            os.close(into)
            text, error = _watch(child, output, timeout, report)
            os.close(output)
            os.kill(child, signal.SIGKILL)  # nothing to one that has ended
            used = os.wait4(child, 0)[2]
            if report[0] and not error:
                error = report[1:].rstrip(b"\0").decode("utf-8", "replace")
            elif not error:  # it died: of the CPU limit, or of something else
                error = "timeout" if used.ru_utime + used.ru_stime > 0.9 * cpu else "killed"
            _send(1, (not error, text.decode("utf-8", "replace"), error or None))
    finally:  # the caller is gone
        os.rmdir(os.getcwd())


def _watch(child, output, timeout, report):
    """Collect what the child prints until it ends or must end -> (bytes, None or why it must)."""
    text, deadline = b"", time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        ready = select.select([0, output], [], [], left)[0]
        if 0 in ready:  # the caller never speaks while it waits: this is its end
            os.kill(child, signal.SIGKILL)
            sys.exit()
        if ready:
            part = os.read(output, 65536)
            text += part
            if len(text) > OUTPUT:
                return text[:OUTPUT], "output"
            if not part:
                break
    while not report[0] and time.monotonic() < deadline:
        # End of file without a report: it is dying, or closed descriptor 1 and goes on.
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return text, None
        time.sleep(0.001)
    return text, None if report[0] else "timeout"


# --- the child ------------------------------------------------------------------------------------


def _child(code, stdin, cpu, standard, main, report, seal):
    """Lock this process down, run the program, write how it ended into `report`. Never returns."""
    try:
        for target, source in enumerate(standard):
            os.dup2(source, target)
        os.closerange(3, 16)
        output = sys.stdout
        if stdin:
            sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))  # hard = soft: no SIGXCPU to catch
        sys.addaudithook(_audit)
        seal()
        error = _execute(code, main.__dict__)
        with suppress(ValueError):  # the program closed it
            output.flush()
        report[1:] = error.encode("utf-8", "replace")[:1023].ljust(1023, b"\0")
        report[0] = 1
    finally:
        os._exit(0)  # no clean-up: the program may have left threads, exit handlers, locks


def _execute(code, namespace):
    """Run the program -> "" or its error in one line."""
    try:
        exec(compile(code, "<program>", "exec"), namespace)
    except SystemExit as leave:
        return "" if leave.code is None or leave.code == 0 else f"SystemExit: {leave.code}"[:200]
    except MemoryError:
        namespace.clear()  # make room for the report
        return "memory"
    except BaseException as problem:
        text = " ".join(str(problem).split())[:200]
        return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
    return ""


_LIBRARY = tuple(os.path.join(folder, "") for folder in sys.path[1:])  # the script's folder is 0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DENIED = ("os.", "socket.", "subprocess.", "ctypes.", "shutil.", "pty.", "fcntl.", "resource.",
           "sqlite3.", "syslog.", "signal.pthread_kill", "tempfile.")  # fmt: skip
_GRANTED = ("os.putenv", "os.unsetenv", "os.walk", "os.fwalk")


def _audit(event, args):
    """Python calls this before it opens, imports, forks, connects ...; raising forbids it."""
    if event == "import" and args[0].split(".")[0] in ("ctypes", "_ctypes", "_posixshmem"):
        raise ImportError(f"not allowed in the sandbox: import {args[0]}")
    if event in ("open", "os.listdir", "os.scandir"):
        path = args[0]
        writes = event == "open" and args[2] & _WRITES
        if isinstance(path, int) and path <= 2 and not writes:
            return
        if isinstance(path, (str, bytes)) and not writes:
            if os.path.join(os.path.abspath(os.fsdecode(path)), "").startswith(_LIBRARY):
                return
    elif not event.startswith(_DENIED) or event in _GRANTED:
        return
    raise PermissionError(f"not allowed in the sandbox: {event}")


# What the kernel refuses: system calls by their numbers on (x86-64, arm64).
_REFUSED = dict(
    clone=(56, 220), clone3=(435, 435), fork=(57,), vfork=(58,), execve=(59, 221), kill=(62, 129),
    execveat=(322, 281), tkill=(200, 130), socket=(41, 198), unlink=(87,), unlinkat=(263, 35),
    rmdir=(84,), rename=(82,), renameat=(264, 38), renameat2=(316, 276), truncate=(76, 45),
    mkdir=(83,), mkdirat=(258, 34), mknod=(133,), mknodat=(259, 33), pidfd_send_signal=(424, 424),
)  # fmt: skip


def _seal():
    """-> a function after which the kernel answers `_REFUSED` with EPERM for the rest of this
    process's life (`man 2 seccomp`); where that is not to be had, it does nothing. The filter is
    a program of steps (code, steps to skip if true, steps to skip if false, value)."""
    column = {"x86_64": 0, "aarch64": 1}.get(os.uname().machine)
    if sys.platform != "linux" or column is None:
        return lambda: None
    import ctypes

    load, equal, answer = 0x20, 0x15, 0x06
    allow, refuse = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001)  # errno 1, EPERM
    steps = [(load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), allow]  # machine?
    steps.append((load, 0, 0, 0))  # the number of the call
    for numbers in _REFUSED.values():
        if column < len(numbers):
            steps += [(equal, 0, 1, numbers[column]), refuse]
    steps.append(allow)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HP", len(steps), ctypes.addressof(code))
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_ulong]
    for name in [name for name in sys.modules if "ctypes" in name]:
        del sys.modules[name]  # or else a program's own `import ctypes` would find it

    def seal(code=code):  # the default keeps `code` alive
        prctl(38, 1, None, 0, 0)  # PR_SET_NO_NEW_PRIVS: allows the next line to ordinary users
        prctl(22, 2, program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

    return seal


if __name__ == "__main__":
    _serve()
else:
    atexit.register(close)
    os.register_at_fork(after_in_child=_forget)
