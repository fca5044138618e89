"""Runs Python that a language model wrote, and survives it.

    run("print(6 * 7)")                      -> Result(ok=True, stdout='42\\n', error=None)
    run("1 / 0").error                       -> 'ZeroDivisionError: division by zero'
    run_many([code, (code, stdin), ...])     -> one Result each, in order

A call into C such as `7 ** 60 ** 60` never returns to the interpreter, so no exception, signal
handler or thread of the same process can stop it; SIGKILL from another process can. Hence three
floors. The caller talks to a few *workers*: bare interpreters, started once. A worker forks one
*child* per program (1 ms: no torch inside), watches it, and kills it at the deadline. Whatever a
program breaks, it breaks in a process that is thrown away. What it meets there, from the kernel's
resource limits [K], a Python audit hook [A] and the worker [W]:
- time: `timeout` s on the wall [W], about as much CPU time [K]; 64 KiB of output, then death [W]
- 256 MiB of address space, 16 open files, not one byte written to a file [K]
- no second process, no signal to another one, no network [A]
- no opening for writing, deleting, renaming; no reading outside the standard library [A]
- an empty environment, the same `random` numbers and hashes in every run [W]

This guards against the accidents of a small model; it is NO boundary against an attacker, who can
fool an audit hook from inside the process. Threads may start; they die with their program. Some
calls raise no audit event: os.stat sees which files exist, os.mkfifo makes an empty one. A program
that shares its text with the lines that test it can forge what they print. macOS ignores the limit
on memory. For code from strangers use a virtual machine.
"""
import atexit, builtins, gc, io, marshal, math, mmap  # noqa: E401
import os, random, resource, select, signal, sys, time  # noqa: E401
from collections import namedtuple
from contextlib import suppress

TIMEOUT = 2.0  # seconds of wall time for one program
MEMORY = 256 << 20  # bytes of address space, the interpreter's own 20 MiB included
OUTPUT = 64 << 10  # bytes of standard output
GRACE = 5.0  # seconds after the deadline at which the worker itself counts as stuck

# ok: ran to its end, or left by sys.exit(0). error: None or one line: 'ErrorName: message',
# 'timeout', 'memory', 'output' (too much), 'killed' (any other death, as by os._exit).
Result = namedtuple("Result", "ok stdout error")


def run(code, stdin="", timeout=TIMEOUT):
    """Run one program -> Result. See `run_many`."""
    return run_many([(code, stdin)], timeout)[0]


def run_many(programs, timeout=TIMEOUT, workers=None):
    """Run programs, each a str or a pair (code, stdin), -> a list of Result in the same order.

    timeout: seconds of wall time for each. workers: how many run at once; by default the usable
    cores, at most 4. What a program does never raises here; TypeError is for wrong arguments,
    RuntimeError for a worker that cannot be started. Idle workers stay for the next call.
    """
    from multiprocessing.connection import wait  # here: without it the worker forks faster

    jobs = [(program, "") if isinstance(program, str) else tuple(program) for program in programs]
    if not all(len(job) == 2 and all(isinstance(text, str) for text in job) for job in jobs):
        raise TypeError("a program is a str or a pair of them, (code, stdin)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results, busy = [None] * len(jobs), {}  # busy: worker -> the index of its job
    todo = list(range(len(jobs)))
    try:
        while todo or busy:
            while todo and len(busy) < (workers or min(4, cores)):
                worker = _idle_worker()
                busy[worker] = todo.pop()
                worker.ask((*jobs[busy[worker]], timeout))
            answered = wait(busy, timeout + GRACE)
            for worker in answered or list(busy):
                answer = worker.answer() if answered else None
                results[busy.pop(worker)] = Result(*answer or (False, "", "killed"))
                if answer:
                    _idle.append(worker)
                else:  # dead, or so silent that it is as good as dead
                    worker.stop()
    finally:  # Ctrl-C: keep no worker in the middle of a conversation
        for worker in busy:
            worker.stop()
    return results


class _Worker:
    """A worker process as its caller sees it. It ends with its caller, whose pipe then closes."""

    def __init__(self):
        import subprocess

        environment = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}  # to start
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-s", "-B", "-X", "utf8", os.path.abspath(__file__)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
            env={**environment, "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C in the terminal reaches the caller only
        )  # fmt: skip
        self.fileno = self.process.stdout.fileno  # what `wait` waits for
        if not self.answer():
            raise RuntimeError(f"the sandbox cannot start {sys.executable}; its message is above")

    def ask(self, request):
        with suppress(BrokenPipeError):  # dead: its answer will be an end of file
            marshal.dump(request, self.process.stdin)
            self.process.stdin.flush()

    def answer(self):
        """-> what the worker says, or None when it is dead."""
        with suppress(EOFError):
            return marshal.load(self.process.stdout)

    def stop(self):
        with suppress(OSError):  # its group is itself and the program that it is running
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()  # closes the pipes and buries it


_idle = []  # workers without a job


def _idle_worker():
    with suppress(IndexError):  # not `if _idle`: another thread may be faster
        return _idle.pop()
    return _Worker()


def close():
    """Stop the idle workers. The next `run` starts new ones."""
    while _idle:
        _idle.pop().stop()


atexit.register(close)
os.register_at_fork(after_in_child=_idle.clear)  # the workers belong to the parent


# --- in the worker, and in the child that it forks ------------------------------------------------


def _serve():
    """The worker's life: receive a program on descriptor 0, run it in a child, answer on 1."""
    del sys.path[0]  # the folder of this file
    sys.argv, builtins.exit, builtins.quit = [""], sys.exit, sys.exit
    os.environ.clear()
    sys.modules.update(dict.fromkeys(_BEHIND_THE_HOOK))  # None there makes an import fail
    main = sys.modules["__main__"] = type(sys)("__main__")  # the programs', each in its own copy
    report = mmap.mmap(-1, 1024)  # shared with the child, which writes its error here
    null = os.open(os.devnull, os.O_RDWR)
    gc.collect(), gc.freeze()  # children then copy fewer pages
    reply = "ready"
    with suppress(EOFError, BrokenPipeError):  # the caller is gone
        while True:
            marshal.dump(reply, sys.stdout.buffer)
            sys.stdout.flush()
            code, stdin, timeout = marshal.load(sys.stdin.buffer)
            report[:] = b"killed".ljust(1024, b"\0")  # should it not come to writing anything
            output, into = os.pipe()
            child = os.fork()
            if child == 0:
                _child(code, stdin, timeout, (null, into, null), main, report)  # never returns
            os.close(into)
            text, error = _watch(child, output, timeout)
            os.close(output)
            error = error or report[:].rstrip(b"\0").decode("utf-8", "replace")
            reply = (not error, text.decode("utf-8", "replace"), error or None)
    os._exit(0)


def _watch(child, output, timeout):
    """Collect what the child prints to its end, then bury it -> (bytes, "" or why it had to end)"""
    text, error, deadline = b"", "timeout", time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0:
        ready = select.select([0, output], [], [], left)[0]
        if 0 in ready:  # the caller never speaks while it waits: this is its end
            os.kill(child, signal.SIGKILL)
            os._exit(0)
        if ready:
            part = os.read(output, OUTPUT)
            text += part
            if not part or len(text) > OUTPUT:
                error = "output" if part else ""
                break
    os.kill(child, signal.SIGKILL)  # does nothing to one that has ended by itself
    os.waitpid(child, 0)
    return text[:OUTPUT], error


def _child(code, stdin, timeout, standard, main, report):
    """Lock this process down, run the program, write how it ended into `report`. Never returns."""
    try:
        for target, source in enumerate(standard):
            os.dup2(source, target)
        os.closerange(3, 16)
        output, sys.stdin = sys.stdout, io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
        random.seed(0)
        limits = dict(AS=MEMORY, FSIZE=0, CORE=0, NOFILE=16, NPROC=0)  # NPROC does not bind root
        limits["CPU"] = math.ceil(timeout) + 1  # for the case that the worker is dead
        for name, most in limits.items():
            with suppress(ValueError, OSError):  # macOS refuses some; a lower one may be in force
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
        sys.addaudithook(_audit)
        error = _execute(code, main.__dict__)
        with suppress(ValueError):  # the program closed it
            output.flush()
        report[:] = error.encode("utf-8", "replace")[:1024].ljust(1024, b"\0")
    finally:
        os._exit(0)  # no clean-up: the program may have left threads, exit handlers, locks


def _execute(code, namespace):
    """Run the program -> "" or its error in one line."""
    try:
        exec(compile(code, "<program>", "exec"), namespace)
    except SystemExit as leave:
        return "" if leave.code in (None, 0) else f"SystemExit: {leave.code}"[:200]
    except MemoryError:
        namespace.clear()  # make room for the report
        return "memory"
    except BaseException as problem:
        text = " ".join(str(problem).split())[:200]
        return f"{type(problem).__name__}: {text}" if text else type(problem).__name__
    return ""


_LIBRARY = tuple(os.path.join(folder, "") for folder in sys.path[1:])  # the script's folder is 0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DENIED = ("os.", "socket.", "subprocess.", "ctypes.", "resource.", "syslog.")
_GRANTED = ("os.putenv", "os.unsetenv", "os.walk", "os.fwalk")
# Their C code starts programs, shares memory or opens files without an audit event.
_BEHIND_THE_HOOK = ("_ctypes", "_multiprocessing", "_posixshmem", "_sqlite3", "_dbm", "_gdbm")


def _audit(event, args):
    """Python calls this before it opens, forks, connects ...; raising forbids it."""
    if event in ("open", "os.listdir", "os.scandir"):
        path = os.path.join(os.path.abspath(str(args[0])), "")
        allowed = path.startswith(_LIBRARY) and not (event == "open" and args[2] & _WRITES)
    else:
        allowed = event in _GRANTED or not event.startswith(_DENIED)
    if not allowed:
        raise PermissionError(f"not allowed in the sandbox: {event}")


if __name__ == "__main__":
    _serve()
