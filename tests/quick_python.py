"""Stands for the interpreter where tests start a program by a command line.

A start of Python with all that the programs import takes seconds; this one takes hundredths. It
asks the server of `quick_server.py`, which has imported everything, for a fork that runs the
command. For its parent, this process is the program: the fork gets its files, signals and
surroundings, and each of the two ends as the other does. What the server cannot do (options of the
interpreter, a module that hides one of the server) is done by the real interpreter.

The fixture `quick_python` writes this file beside the server's socket, with a first line that names
the real interpreter. It must import little.
"""

import contextlib
import marshal
import os
import select
import signal
import socket
import sys

# Python sets these itself. SIGCHLD is no request.
OWN = {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGCONT, signal.SIGWINCH}
UNCATCHABLE = {signal.SIGKILL, signal.SIGSTOP}
# Variables that start another interpreter than the server's.
NEUTRAL = {
    *("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONSAFEPATH"),
    "PYTHON_COLORS",  # of tracebacks, since Python 3.13
}


def main() -> None:
    words = sys.argv[1:]
    unbuffered = words[:1] == ["-u"]
    command = words[unbuffered:]
    odd = [name for name in os.environ if name.startswith("PYTHON") and name not in NEUTRAL]
    if odd or not command or (command[0][:1] == "-" and command[0] not in ("-c", "-m")):
        start_really(words)
    signals = signal.valid_signals() - OWN - UNCATCHABLE
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    ignored = [int(n) for n in signals if signal.getsignal(n) is signal.SIG_IGN]
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(os.path.join(os.path.dirname(__file__), "socket"))  # noqa: PTH118, PTH120
    except OSError:
        start_really(words)
    ours, theirs = socket.socketpair()
    files = [int(name) for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
    files = [number for number in files if is_inheritable(number)]
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "shim": __file__,
        "command": command,
        "unbuffered": unbuffered or bool(os.environ.get("PYTHONUNBUFFERED")),
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "umask": umask,
        "ignored": ignored,
        "blocked": [int(number) for number in blocked],
        "files": files,
        "client": os.getpid(),
    }
    text = marshal.dumps(request)
    numbers = [theirs.fileno(), *files]
    socket.send_fds(server, [len(text).to_bytes(8, "little")], numbers)
    server.sendall(text)
    theirs.close()
    fork = number_from(server)
    if not fork:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        start_really(words)
    for number in signals - set(ignored):
        signal.signal(number, lambda number, _: os.kill(fork, number))
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    with contextlib.suppress(OSError), open("/proc/self/comm", "w") as name:  # noqa: PTH123
        name.write(f"for {fork}")
    for number in files:  # a pipe ends when the fork has ended
        os.close(number)
    end_as(status_of(server, ours))


def start_really(words: list[str]) -> None:
    """Become the real interpreter."""
    os.execv(sys.executable, [sys.executable, *words])


def is_inheritable(number: int) -> bool:
    try:
        return os.get_inheritable(number)
    except OSError:  # the one by which the folder was listed
        return False


def number_from(server: socket.socket) -> int:
    text = b""
    while len(text) < 8:
        part = server.recv(8 - len(text))
        if not part:  # the server was killed
            os._exit(70)
        text += part
    return int.from_bytes(text, "little")


def status_of(server: socket.socket, fork: socket.socket) -> int:
    """Return the status with which the fork ended, as `os.wait` tells it."""
    open_ones = [server, fork]
    while True:
        ready, _, _ = select.select(open_ones, [], [])
        if fork in ready:
            wish = fork.recv(1)
            if wish:
                end_with_parent(wish[0])
                fork.sendall(b"!")
            else:
                open_ones.remove(fork)
        elif server in ready:
            return number_from(server)


def end_with_parent(number: int) -> None:
    """Get a signal when the parent of this process ends, because the fork asked for that."""
    import ctypes

    ctypes.CDLL(None).prctl(1, number)


def end_as(status: int) -> None:
    """End this process as the fork ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in UNCATCHABLE:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
