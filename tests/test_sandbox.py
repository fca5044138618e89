"""What a generated program may try, and what the sandbox makes of it.

Each test is one accident (or one trick) of generated code; its docstring names the usual mistake,
the guard that looks sufficient and is not.
"""
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import sandbox  # noqa: E402

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
HERE = os.path.dirname(os.path.abspath(sandbox.__file__))
LATE = 5.0  # seconds: a program of 0.5 s CPU time ends well before, even on a busy machine
WAIT = 20.0  # seconds for a process to start or to end, however busy the machine


def quick(code, stdin="", timeout=0.5):
    """Run with a short deadline (s), check that it held and that the next program is unharmed."""
    start = time.monotonic()
    result = sandbox.run(code, stdin, timeout)
    assert time.monotonic() - start < LATE
    assert sandbox.run("print('next')") == (True, "next\n", None)
    return result


def refused(result, event=""):
    refusal = f"PermissionError: not allowed in the sandbox: {event}"
    assert not result.ok and result.error.startswith(refusal), result


# --- the ordinary case ----------------------------------------------------------------------------


def test_result():
    """Usual mistake: capturing stderr into stdout, so that a judge reads a traceback as output."""
    assert sandbox.run("print(6 * 7)") == (True, "42\n", None)
    result = sandbox.run("print('before')\n1 / 0")
    assert result == (False, "before\n", "ZeroDivisionError: division by zero")
    assert sandbox.run("import sys; print('x', file=sys.stderr)") == (True, "", None)
    assert sandbox.run("def f(:").error.startswith("SyntaxError: ")
    assert sandbox.run("raise ValueError('two\\nlines')").error == "ValueError: two lines"
    assert sandbox.run("raise KeyError").error == "KeyError"
    assert len(sandbox.run("raise ValueError('x' * 10**6)").error) < 300
    main = "def f(): return g()\ndef g(): return __name__\nif __name__ == '__main__': print(f())"
    assert sandbox.run(main).stdout == "__main__\n"


def test_error_that_cannot_be_printed():
    """Usual mistake: str(exception) in the judge's process, where it may raise or never return."""
    assert not quick("class E(Exception):\n def __str__(self): 1 / 0\nraise E").ok
    result = quick("class E(Exception):\n def __str__(self):\n  while True: pass\nraise E")
    assert result.error == "timeout"


def test_stdin():
    """Usual mistake: leaving stdin on the terminal, so that a guessing game waits for ever."""
    game = "while True:\n n = int(input('? '))\n if n == 7: break\nprint('yes')"
    assert sandbox.run(game, "3\n7\n") == (True, "? ? yes\n", None)
    assert quick(game, "3\n").error == quick(game).error == "EOFError: EOF when reading a line"
    assert sandbox.run("import sys; print(len(sys.stdin.read()))", "x" * 99999).stdout == "99999\n"
    assert sandbox.run("import sys; print(len(sys.stdin.buffer.read()))", "é").stdout == "2\n"


def test_unicode():
    """Usual mistake: an empty environment means the C locale, and Chinese output is an error."""
    code = "名 = input()\nprint('你好，' + 名, '🙂')"
    assert sandbox.run(code, "世界\n") == (True, "你好，世界 🙂\n", None)
    assert sandbox.run("raise ValueError('错')").error == "ValueError: 错"
    assert sandbox.run("print('\\ud800')").error.startswith("UnicodeEncodeError")
    assert sandbox.run("import os; os.write(1, b'\\xff')").stdout == "\ufffd"


def test_order_is_kept():
    """Usual mistake: returning results as they arrive; the slow first program then comes last."""
    programs = [f"import time; time.sleep({0.02 * (12 - i)}); print({i})" for i in range(12)]
    results = sandbox.run_many(programs, workers=4)
    assert [r.stdout for r in results] == [f"{i}\n" for i in range(12)]
    assert sandbox.run_many([]) == []


def test_wrong_arguments():
    """Usual mistake: finding out in the worker, where the error looks like the program's."""
    for programs in ([b"1"], [("1",)], [("1", 2)], [("1", "", "")]):
        with pytest.raises(TypeError):
            sandbox.run_many(programs)


def test_leaving():
    """Usual mistake: catching Exception, which lets SystemExit through and ends the worker."""
    assert sandbox.run("import sys; print(1); sys.exit(0)") == (True, "1\n", None)
    assert sandbox.run("exit()").ok and sandbox.run("quit(0)").ok
    assert sandbox.run("import sys; sys.exit(3)").error == "SystemExit: 3"
    assert sandbox.run("import sys; sys.exit('bad input')").error == "SystemExit: bad input"
    assert quick("import os; os._exit(0)").error == "killed"
    assert quick("import os; os.abort()").error == "killed"
    assert quick("raise KeyboardInterrupt").error == "KeyboardInterrupt"


# --- time -----------------------------------------------------------------------------------------


def test_power_tower():
    """Usual mistake: signal.alarm, or a thread with a deadline. One call into C holds the
    interpreter; no handler and no other thread runs before it returns, after the sun has gone."""
    assert quick("n = 7\nprint(n ** 60 ** 60)").error in ("timeout", "memory")


@pytest.mark.parametrize("code", [
    "while True: pass",
    "import time; time.sleep(60)",  # no CPU time at all: RLIMIT_CPU alone never ends it
    "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "def f():\n try: f()\n finally: f()\nf()",  # recursion that catches its own error
    "import signal\nfor s in range(1, 65):\n try: signal.signal(s, signal.SIG_IGN)\n"
    " except (OSError, ValueError): pass\nwhile True: pass",
    "import signal\nsignal.raise_signal(signal.SIGSTOP)",  # stops itself: neither ends nor runs
])  # fmt: skip
def test_never_ends(code):
    """Usual mistake: asking politely. SIGALRM, SIGTERM and SIGXCPU can be caught; a program that
    sleeps uses no CPU time."""
    assert quick(code, timeout=0.1).error == "timeout"


@linux
def test_a_busy_machine_changes_no_verdict():
    """Usual mistake: a deadline on the wall clock, which fails a good program because eight others
    happen to run on its core."""
    sandbox.close()
    sandbox.run("1")
    core = {min(os.sched_getaffinity(0))}
    os.sched_setaffinity(sandbox._idle[0].process.pid, core)
    others = []
    try:
        for _ in range(8):  # each in its own session, else the kernel may count them as one
            command = [sys.executable, "-SsE", "-c", "while True: pass"]
            others.append(subprocess.Popen(command, start_new_session=True))
            os.sched_setaffinity(others[-1].pid, core)
        start = time.monotonic()
        code = "import time\nwhile time.process_time() < 0.15: pass\nprint('done')"
        assert sandbox.run(code, timeout=0.5) == (True, "done\n", None)
        assert time.monotonic() - start > 0.5
    finally:
        for other in others:
            other.kill(), other.wait()
        sandbox.close()  # the worker on the one core


def test_closed_descriptors():
    """Usual mistake: waiting for a program whose output has ended."""
    assert quick("import os\nos.close(1)\nwhile True: pass", timeout=60).error == "killed"
    code = "import os, time\nos.closerange(0, 99)\ntime.sleep(60)"
    assert quick(code, timeout=60).error == "killed"


def test_cpu_limit_is_hard():
    """Usual mistake: a soft limit below the hard one: the kernel sends SIGXCPU, which the program
    may ignore. This limit ends a program that ignores SIGPROF, even if its worker was killed."""
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_CPU))"
    assert sandbox.run(code, timeout=7).stdout == "(8, 8)\n"


def test_timeouts_do_not_queue_up():
    """Usual mistake: waiting for a batch as a whole: one slow program then stalls the fast ones."""
    programs = ["while True: pass", *["print(1)"] * 25, "import time; time.sleep(9)"] * 2
    start = time.monotonic()
    results = sandbox.run_many(programs, timeout=0.2, workers=2)
    assert time.monotonic() - start < LATE
    assert [r.error for r in results].count("timeout") == 4 and sum(r.ok for r in results) == 50


# --- memory, output, files ------------------------------------------------------------------------


@pytest.mark.parametrize("code", [
    "x = bytearray(400 << 20)",
    "x = [0] * 10 ** 10",
    "x = 'x' * 10 ** 12",
    "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "x = 'x'\nwhile True: x += x",
    "x = []\nwhile True: x.append([])",  # small pieces leave no room for the report
    "x, i = {}, 0\nwhile True: x[i], i = str(i), i + 1",
])  # fmt: skip
def test_memory_bomb(code):
    """Usual mistake: no limit, and the kernel kills the largest process: the training run."""
    assert quick(code, timeout=2).error == "memory"


def test_memory_error_may_be_handled():
    """Usual mistake: killing at the limit, where Python itself survives it."""
    code = "try: x = [0] * 10 ** 10\nexcept MemoryError: print('too big')"
    assert sandbox.run(code) == (True, "too big\n", None)


def test_recursion():
    """Usual mistake: raising the recursion limit "to be safe": the C stack overflows, and the
    process dies with no exception to catch."""
    assert quick("def f(): return f()\nf()").error.startswith("RecursionError")
    deep = "import sys\nsys.setrecursionlimit(10**9)\n"
    assert quick(deep + "def f(): return f()\nf()").error in ("killed", "memory", "timeout")
    nested = "class A:\n def __repr__(self): return repr(self)\nrepr(A())"
    assert not quick(deep + nested).ok
    assert not quick("(" * 10**5).ok


def test_endless_output():
    """Usual mistake: subprocess.communicate(), which collects gigabytes before the timeout."""
    result = quick("while True: print('spam ' * 100)")
    assert result.error == "output" and len(result.stdout) == sandbox.OUTPUT
    assert quick("print('x' * 10**6)").error == "output"
    assert sandbox.run("print('x' * 60000)").ok


def test_closed_or_replaced_stdout():
    """Usual mistake: the judge's own last flush fails on a file that the program has closed."""
    assert quick("import sys; print(1); sys.stdout.close()") == (True, "1\n", None)
    assert quick("import sys; sys.stdout.close(); print(1)").error.startswith("ValueError")
    assert quick("import sys, io; print(1); sys.stdout = io.StringIO()") == (True, "1\n", None)
    assert quick("import sys; del sys.stdout; sys.__dict__.clear()").error is None


def test_files(tmp_path):
    """Usual mistake: trusting the temporary directory: every other path is still writable."""
    precious = tmp_path / "precious.txt"
    precious.write_text("weights")
    for action in (
        "open({!r}, 'w')", "open({!r}, 'a')", "open({!r}, 'r+')", "open({!r})",
        "import os; os.open({!r}, os.O_RDWR)", "import os; os.remove({!r})",
        "import os; os.truncate({!r}, 0)", "import os; os.rename({!r}, 'y')",
        "import os; os.chmod({!r}, 0)", "import os; os.link({!r}, 'y')",
        "import os; os.listdir(os.path.dirname({!r}))",
        "import pathlib; pathlib.Path({!r}).unlink()",
    ):  # fmt: skip
        refused(sandbox.run(action.format(str(precious))))
    tree = f"import shutil; shutil.rmtree({str(tmp_path)!r})"
    assert sandbox.run(tree).error.startswith("PermissionError")  # Python 3.13 rewrites the message
    refused(sandbox.run("open('new.txt', 'w')"), "open")
    refused(sandbox.run("import os; open(os.__file__, 'r+')"), "open")  # may be read, not written
    refused(sandbox.run("import os; open(os.__file__ + '/../../../../../../etc/passwd')"), "open")
    refused(sandbox.run("import os; os.listdir()"), "os.listdir")
    refused(sandbox.run("import os; os.mkdir('x')"), "os.mkdir")
    assert precious.read_text() == "weights" and os.listdir(tmp_path) == ["precious.txt"]


def test_standard_library_can_be_imported():
    """Usual mistake: refusing all reading, which refuses `import` as well."""
    names = "bisect, collections, dataclasses, datetime, decimal, fractions, functools, heapq, "
    names += "itertools, json, math, random, re, statistics, string, typing, uuid, asyncio"
    assert sandbox.run(f"import {names}\nprint(json.dumps([1]), math.pi > 3)").ok
    assert sandbox.run("import torch").error == "ModuleNotFoundError: No module named 'torch'"
    assert sandbox.run("import sandbox").error == "ModuleNotFoundError: No module named 'sandbox'"


@linux
def test_limits_that_the_hook_does_not_see():
    """Usual mistake: an audit hook alone. memfd_create, dup and mkfifo raise no event."""
    memory_file = "import os; os.write(os.memfd_create('x'), b'x')"
    assert sandbox.run(memory_file).error == "OSError: [Errno 27] File too large"
    result = sandbox.run("import os\nwhile True: print(os.dup(1))")
    assert "Too many open files" in result.error and result.stdout.split()[-1] == "15"


# --- processes, network ---------------------------------------------------------------------------


@pytest.mark.parametrize("code, event", [
    ("import os\nwhile True: os.fork()", "os.fork"),
    ("import os; os.system('true')", "os.system"),
    ("import os; os.execv('/bin/true', ['true'])", "os.exec"),
    ("import os; os.kill(os.getppid(), 9)", "os.kill"),
    ("import os; os.kill(-1, 9)", "os.kill"),
    ("import os; os.killpg(0, 9)", "os.killpg"),
    ("import subprocess; subprocess.run(['true'])", "subprocess.Popen"),
    ("import multiprocessing as m; m.get_context('fork').Process(target=print).start()", "os.fork"),
    ("import multiprocessing as m; m.get_context('spawn').Process(target=print).start()", None),
    ("import socket; socket.socket()", "socket.__new__"),
    ("import urllib.request as u; u.urlopen('http://127.0.0.1:9')", None),
    ("import asyncio; asyncio.run(asyncio.sleep(0))", "socket.__new__"),
])  # fmt: skip
def test_processes_and_network(code, event):
    """Usual mistake: RLIMIT_NPROC. It does not bind root, and containers often run as root."""
    result = quick(code)
    refused(result, event) if event else None
    assert not result.ok


@pytest.mark.parametrize("name", ["ctypes", "sqlite3", "_dbm", "_multiprocessing"])
def test_modules_that_go_behind_the_hook(name):
    """Usual mistake: an audit hook alone: C code that opens a file itself raises no event."""
    assert quick(f"import {name}").error.startswith("ModuleNotFoundError")


def test_threads():
    """Usual mistake: joining a program's threads: a non-daemon thread never lets it end."""
    code = "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
    assert quick(code).error in (None, "RuntimeError: can't start new thread")  # as root, others


def test_environment_is_empty(monkeypatch):
    """Usual mistake: inheriting it: keys and tokens live there."""
    monkeypatch.setenv("SECRET_TOKEN", "42")
    sandbox.close()
    code = "import os, sys; print(dict(os.environ), os.getcwd(), sys.argv, os.getenv('HOME'))"
    environment, folder = sandbox.run(code).stdout.split(" ", 1)
    assert environment == "{}" and folder == "/ [''] None\n"


# --- the next program -----------------------------------------------------------------------------


def test_programs_do_not_see_each_other():
    """Usual mistake: exec() in a reused process: a patched builtin judges everybody after it."""
    poison = """if True:
        import builtins, json, math, os, random, sys, gc, atexit, signal
        builtins.print = builtins.len = lambda *_: None
        json.dumps = random.random = math.sqrt = lambda *_: 0
        os.environ["POISON"] = "1"
        sys.modules["json"] = None
        sys.setrecursionlimit(50); gc.disable(); sys.path.clear()
        atexit.register(lambda: 1 / 0); signal.alarm(1)
        import __main__; __main__.poison = True
    """
    fresh = """if True:
        import gc, json, math, os, random, sys, __main__
        print(json.dumps([1]), math.sqrt(4), len([1]), dict(os.environ), sys.getrecursionlimit(),
              gc.isenabled(), hasattr(__main__, "poison"))
    """
    expected = sandbox.run(fresh)
    assert expected.ok and expected.stdout.startswith("[1] 2.0 1 {} 1000 True False")
    assert sandbox.run_many([poison, fresh] * 3, workers=1) == [(True, "", None), expected] * 3


def test_same_random_numbers_in_every_run():
    """Usual mistake: seeding the worker. `random` seeds itself anew after every fork."""
    code = "import random; print(random.random(), hash('x'), {'a', 'b', 'c', 'd'})"
    first = sandbox.run(code)
    sandbox.close()
    assert {*sandbox.run_many([code] * 8, workers=2)} == {first} and first.ok
    assert sandbox.run("import random; random.seed(0); print(random.random())").stdout.split()[0] \
        == first.stdout.split()[0]  # fmt: skip


# --- the caller -----------------------------------------------------------------------------------


def test_a_dead_worker_is_replaced():
    """Usual mistake: a broken pipe that ends the run, or takes other programs' results along."""
    sandbox.close()
    sandbox.run_many(["import time; time.sleep(0.1)"] * 2, workers=2)
    victims = [worker.process.pid for worker in sandbox._idle]
    threading.Timer(0.1, lambda: [os.kill(pid, signal.SIGKILL) for pid in victims]).start()
    programs = [f"import time; time.sleep(0.05); print({i})" for i in range(20)]
    results = sandbox.run_many(programs, workers=2)
    assert [r.error for r in results].count("killed") == len(victims) == 2
    assert all(r.error == "killed" or r == (True, f"{i}\n", None) for i, r in enumerate(results))
    idle = sandbox._idle[-1].process
    idle.kill(), idle.wait()
    assert sandbox.run("print(1)").error == "killed" and sandbox.run("print(1)").ok


def test_a_stuck_worker_is_replaced(monkeypatch):
    """Usual mistake: only the worker watches the clock, and nobody watches the worker."""
    sandbox.close()
    sandbox.run("1")
    monkeypatch.setattr(sandbox, "GRACE", 0.2)
    stuck = sandbox._idle[0].process
    os.kill(stuck.pid, signal.SIGSTOP)
    start = time.monotonic()
    assert sandbox.run("print(1)", timeout=0.1) == (False, "", "killed")
    assert sandbox.run("print(1)") == (True, "1\n", None)
    assert time.monotonic() - start < LATE and stuck.poll() is not None


def test_interrupted_call_leaves_no_answer_behind(monkeypatch):
    """Usual mistake: going on with the same workers after Ctrl-C: the next call reads the answers
    of the interrupted one."""
    answer, calls = sandbox._Worker.answer, []

    def interrupt(worker):
        calls.append(worker)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return answer(worker)

    sandbox.close()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sandbox._Worker, "answer", interrupt)
        sandbox.run_many(["print('old')"] * 20, workers=2)
    assert len({*calls}) == 2 and calls[-1].process.poll() is not None
    # the other one was stopped too, unless it had just answered and got no new job
    assert all(worker.process.poll() is not None or worker in sandbox._idle for worker in calls)
    assert [r.stdout for r in sandbox.run_many(["print('new')"] * 2, workers=2)] == ["new\n"] * 2


def test_worker_that_cannot_start(monkeypatch):
    """Usual mistake: replacing it for ever."""
    sandbox.close()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="cannot start"):
        sandbox.run("1")
    monkeypatch.undo()
    assert sandbox.run("1").ok


def test_several_threads():
    """Usual mistake: two callers on one pipe: each reads the other's answer."""
    right = []

    def call(i):
        results = sandbox.run_many([f"print({i})"] * 20, workers=2)
        right.append([r.stdout for r in results] == [f"{i}\n"] * 20)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert right == [True] * 4


def test_forked_caller():
    """Usual mistake: a forked data loader writes into its parent's pipes, or stops its workers."""
    sandbox.run("1")
    pids = [worker.process.pid for worker in sandbox._idle]
    child = os.fork()
    if child == 0:
        right = sandbox.run("print(1)").stdout == "1\n"
        right = right and not {w.process.pid for w in sandbox._idle} & set(pids)
        sandbox.close()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert sandbox.run("print(2)").stdout == "2\n"
    assert [worker.process.pid for worker in sandbox._idle] == pids


def alive(groups, zombies=True):
    """Process ids in the process groups `groups`, with those that nobody has waited for."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) in groups and (zombies or fields[0] != "Z"):
            found.append(int(pid))
    return found


@linux
@pytest.mark.parametrize("how", [None, signal.SIGINT, signal.SIGKILL])
def test_no_orphans(how):
    """Usual mistake: atexit alone. It does not run after SIGKILL; and a Ctrl-C in the middle of a
    program must not leave that program running."""
    sleep = "import time; time.sleep(0 if {} else 60)".format(how is None)
    script = f"""if True:
        import signal, sys; sys.path.insert(0, {HERE!r})
        signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs inherit that it is ignored
        import sandbox
        sandbox.run_many(["import time; time.sleep(0.1)"] * 2, workers=2)
        print(*(worker.process.pid for worker in sandbox._idle), flush=True)
        sandbox.run_many([{sleep!r}] * 4, timeout=60, workers=2)
    """
    main = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.DEVNULL)  # fmt: skip
    with main:
        groups = set(map(int, main.stdout.readline().split()))
        assert len(groups) == 2
        if how is not None:
            deadline = time.monotonic() + WAIT
            while len(alive(groups)) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(alive(groups)) == 4  # two workers, two programs
            main.send_signal(how)
        main.wait(timeout=WAIT)
    deadline = time.monotonic() + WAIT
    while alive(groups, zombies=False) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(groups, zombies=False)  # who buries a dead caller's workers is not up to us


@linux
def test_nothing_is_left_behind():
    """Usual mistake: a killed child that nobody waits for stays a zombie."""
    sandbox.close()
    sandbox.run_many(["print(1)", "while True: pass", "import os; os._exit(1)"] * 2, timeout=0.2)
    groups = {worker.process.pid for worker in sandbox._idle}
    assert set(alive(groups)) == groups  # the workers, and no child, not even a zombie
    sandbox.close()
    assert not alive(groups)


def test_throughput():
    """Usual mistake: a new interpreter for each program: 20 ms each, 50 programs a second."""
    programs = [f"def double(x):\n    return 2 * x\nprint(double({i}))" for i in range(300)]
    sandbox.run_many(programs[:2], workers=2)
    rate = 0
    for _ in range(5):  # other jobs may slow one attempt down
        start = time.monotonic()
        results = sandbox.run_many(programs, workers=2)
        rate = max(rate, len(programs) / (time.monotonic() - start))
        assert [r.stdout for r in results] == [f"{2 * i}\n" for i in range(300)]
        if rate > 100:
            break
    print(f"{rate:.0f} programs a second with 2 workers")
    assert rate > 100
