"""Runs Python that a language model wrote, and survives it.

    run("print(6 * 7)") -> Result(ok=True, stdout='42\\n', error=None);  run_many([code, (code, stdin), ...])

A call into C such as `7 ** 60 ** 60` never returns to the interpreter: nothing but its death can stop it.
Hence three floors. The caller talks to *workers*, bare interpreters, started once; a worker forks one *child*
per program (2 ms: no torch inside). The kernel [K], a Python audit hook [A] and the worker [W] grant it
- `timeout` s of CPU time [K], so a busy machine hardly changes a verdict; 5 times that on the wall [W]
- 64 KiB of output; an empty environment; the same `random` and hashes [W]
- 256 MiB of address space, 16 open files, not one byte written to a file [K]
- no second process, signal, network; no writing, deleting, renaming; only Python's own library to read [A]
This guards against the accidents of a small model; it is NO boundary against an attacker, who can fool an audit
hook, forge what tests print, use os.stat or os.mkfifo: take a virtual machine. macOS ignores the memory limit."""
import atexit, builtins, collections, gc, io, marshal, math, mmap, os, random, resource, select, signal, sys, time
from contextlib import suppress

TIMEOUT, PATIENCE = 2.0, 5  # s of CPU time for one program; times that on the wall, as it may sleep or starve
MEMORY, OUTPUT = 256 << 20, 64 << 10  # bytes: address space, the interpreter's own 20 MiB included; stdout
GRACE = 5.0  # seconds after that wall time at which the worker itself counts as stuck
_LIBRARY = tuple(os.path.join(folder, "") for folder in sys.path[1:])  # the script's folder is 0
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_DENIED = ("os.", "socket.", "subprocess.", "ctypes.", "resource.", "syslog.")

# error: None, 'ErrorName: message', 'timeout', 'memory', 'output' (too much) or 'killed' (any other death)
Result = collections.namedtuple("Result", "ok stdout error")  # ok: ran to its end, or left by sys.exit(0)
_idle = []  # workers without a job
os.register_at_fork(after_in_child=_idle.clear)  # they belong to the parent

def run(code, stdin="", timeout=TIMEOUT):
    """Run one program -> Result. See `run_many`."""
    return run_many([(code, stdin)], timeout)[0]

def run_many(programs, timeout=TIMEOUT, workers=None):
    """Run programs, each a str or a pair (code, stdin) -> [Result] in order. timeout: CPU seconds of each;
    workers: at once (default: usable cores, up to 4). Raises at a wrong argument, or if a worker cannot start."""
    jobs = [(program, "") if isinstance(program, str) else tuple(program) for program in programs]
    if not all(len(job) == 2 and all(isinstance(text, str) for text in job) for job in jobs):
        raise TypeError("a program is a str or a pair of them, (code, stdin)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    results, todo, busy = [None] * len(jobs), list(range(len(jobs))), {}  # busy: worker -> its job
    try:
        while todo or busy:
            while todo and len(busy) < (workers or min(4, cores)):
                try:
                    worker = _idle.pop()
                except IndexError:  # not `if _idle`: another thread may be faster
                    worker = _Worker()
                busy[worker] = todo.pop()
                with suppress(BrokenPipeError):  # dead: its answer will be an end of file
                    marshal.dump((*jobs[busy[worker]], timeout), worker.process.stdin)
                    worker.process.stdin.flush()
            answered = select.select(list(busy), [], [], PATIENCE * timeout + GRACE)[0]
            for worker in answered or list(busy):
                answer = worker.answer() if answered else None  # None: dead, or as good as dead
                results[busy.pop(worker)] = Result(*answer or (False, "", "killed"))
                _idle.append(worker) if answer else worker.stop()
    finally:  # Ctrl-C: keep no worker in the middle of a conversation
        for worker in busy:
            worker.stop()
    return results

class _Worker:
    """A worker process as its caller sees it. It ends with its caller, whose pipe then closes."""
    def __init__(self):
        from subprocess import PIPE, Popen  # here: without it the worker forks faster
        self.process = Popen([sys.executable, "-SsB", "-X", "utf8", os.path.abspath(__file__)], cwd="/",
                             env={"PYTHONHASHSEED": "0", "LD_LIBRARY_PATH": os.getenv("LD_LIBRARY_PATH", "")},
                             stdin=PIPE, stdout=PIPE, start_new_session=True)  # Ctrl-C: the caller's affair
        self.fileno = self.process.stdout.fileno  # what `select` waits for
        if not self.answer():
            raise RuntimeError(f"the sandbox cannot start {sys.executable}; its message is above")

    def answer(self):
        with suppress(EOFError):  # dead: None
            return marshal.load(self.process.stdout)

    def stop(self):
        with suppress(OSError):  # its group is itself and the program that it is running
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()  # closes the pipes and buries it

@atexit.register
def close():
    """Stop the workers that wait for the next call. It will start new ones."""
    while _idle:
        _idle.pop().stop()

# ------------------------------------------------------- in the worker, and in the child that it forks
def _serve():
    """The worker's life: receive a program on descriptor 0, run it in a child, answer on 1."""
    del sys.path[0]  # the folder of this file
    sys.argv, builtins.exit, builtins.quit = [""], sys.exit, sys.exit
    os.environ.clear()
    # none of these can be imported: their C code starts programs or opens files without an audit event
    sys.modules.update(dict.fromkeys("_ctypes _multiprocessing _posixshmem _sqlite3 _dbm _gdbm".split()))
    main = sys.modules["__main__"] = type(sys)("__main__")  # the programs', each in its own copy
    report, null = mmap.mmap(-1, 1024), os.open(os.devnull, os.O_RDWR)  # the child writes its error to report
    gc.collect(), gc.freeze()  # children then copy fewer pages
    answer = "ready"
    with suppress(EOFError, BrokenPipeError):  # the caller is gone
        while True:
            marshal.dump(answer, sys.stdout.buffer)
            sys.stdout.flush()
            answer = _judge(*marshal.load(sys.stdin.buffer), null, main.__dict__, report)
    os._exit(0)

def _judge(code, stdin, timeout, null, namespace, report):
    """Fork a child for the program, collect what it prints to its end, bury it -> its Result"""
    report[:] = b"killed".ljust(1024, b"\0")  # should it not come to writing anything
    output, into = os.pipe()
    if not (child := os.fork()):
        _child(code, stdin, timeout, (null, into, null), namespace, report)  # never returns
    os.close(into)
    text, part, deadline = b"", b" ", time.monotonic() + PATIENCE * timeout
    while part and len(text) <= OUTPUT:
        ready = select.select([0, output], [], [], max(0, deadline - time.monotonic()))[0]
        part = os.read(output, OUTPUT) if ready == [output] else b""  # 0 is ready: the caller has gone
        text += part
    os.kill(child, signal.SIGKILL)  # does nothing to one that has ended by itself
    late = os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGPROF or not ready
    os.close(output)
    error = report[:].rstrip(b"\0").decode("utf-8", "replace")
    error = "output" if len(text) > OUTPUT else "timeout" if late else error
    return not error, text[:OUTPUT].decode("utf-8", "replace"), error or None

def _child(code, stdin, timeout, standard, namespace, report):
    """Lock this process down, run the program, write how it ended into `report`. Never returns."""
    try:
        for target, source in enumerate(standard):
            os.dup2(source, target)
        os.closerange(3, 16)
        output, sys.stdin = sys.stdout, io.TextIOWrapper(io.BytesIO(stdin.encode()), "utf-8")
        random.seed(0)
        signal.setitimer(signal.ITIMER_PROF, timeout)  # of CPU time; death even inside a C call
        limits = dict(AS=MEMORY, FSIZE=0, CORE=0, NOFILE=16, NPROC=0, CPU=math.ceil(timeout) + 1)
        for name, most in limits.items():  # CPU: for one that ignores SIGPROF; root ignores NPROC
            with suppress(ValueError, OSError):  # macOS refuses some; a lower one may be in force
                resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
        sys.addaudithook(_audit)
        error = ""
        try:
            exec(compile(code, "<program>", "exec"), namespace)
        except SystemExit as leave:
            error = "" if leave.code in (None, 0) else f"SystemExit: {leave.code}"[:200]
        except MemoryError:
            namespace.clear()  # make room for the report
            error = "memory"
        except BaseException as bad:
            error = f"{type(bad).__name__}: {' '.join(str(bad).split())[:200]}".removesuffix(": ")
        with suppress(ValueError):  # the program closed it
            output.flush()
        report[:] = error.encode("utf-8", "replace")[:1024].ljust(1024, b"\0")
    finally:
        os._exit(0)  # no clean-up: the program may have left threads, exit handlers, locks

def _audit(event, args):
    """Python calls this before it opens, forks, connects ...; raising forbids it."""
    allowed = event in ("os.putenv", "os.unsetenv", "os.walk", "os.fwalk") or not event.startswith(_DENIED)
    if event in ("open", "os.listdir", "os.scandir"):
        path = os.path.join(os.path.abspath(str(args[0])), "")
        allowed = path.startswith(_LIBRARY) and not (event == "open" and args[2] & _WRITES)
    if not allowed:
        raise PermissionError(f"not allowed in the sandbox: {event}")

if __name__ == "__main__":
    _serve()
