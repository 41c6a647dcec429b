"""What a program gets, what comes back, and which status it has."""

import json
import subprocess
import sys

import pytest

from kimi_core.sandbox import Limits, Pool, Result, Status, compile_cpp
from kimi_core.sandbox.program import MB


def test_a_program_reads_stdin_and_its_files(pool: Pool) -> None:
    result = pool.run(
        "import sys, helper\nprint(helper.twice(int(input())), open('data/x').read(), sys.argv)",
        stdin=b"21\n",
        files={"helper.py": b"def twice(x): return 2 * x", "data/x": b"content"},
    )
    assert (result.status, result.exit_code) == (Status.OK, 0)
    assert result.stdout == b"42 content ['main.py']\n"
    assert result.stderr == b""
    assert 0 < result.cpu_s < 5 and 0 < result.wall_s < 10
    assert 1 * MB < result.memory_bytes < 100 * MB


def test_a_command_finds_the_host_and_its_files(pool: Pool) -> None:
    result = pool.run(["/bin/cat", "a/b c", "-"], stdin=b"\x00\xff", files={"a/b c": b"file "})
    assert (result.status, result.stdout) == (Status.OK, b"file \x00\xff")


def test_a_program_is_main_as_if_python_had_started_it(pool: Pool) -> None:
    source = """
import sys, inspect, __main__
from dataclasses import dataclass
from multiprocessing import Pool

@dataclass
class Point:
    x: int

def square(x):
    return x * x

if __name__ == "__main__":
    print(__file__, __main__.Point(3), inspect.getsource(square).count("x"), sys.path[0] == "")
    with Pool(2) as pool:
        print(pool.map(square, range(4)))
    exit(7)
"""
    result = pool.run(source)
    assert result.stdout == b"main.py Point(x=3) 3 True\n[0, 1, 4, 9]\n", result
    assert (result.status, result.exit_code) == (Status.RUNTIME, 7)


def test_a_traceback_shows_the_program_alone(pool: Pool) -> None:
    result = pool.run("def f():\n    return 1 / 0\nf()")
    assert (result.status, result.exit_code) == (Status.RUNTIME, 1)
    lines = result.stderr.decode().splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[1] == '  File "main.py", line 3, in <module>'
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "<string>" not in result.stderr.decode()


def test_a_syntax_error_is_the_programs(pool: Pool) -> None:
    result = pool.run("print(")
    assert (result.status, result.exit_code) == (Status.RUNTIME, 1)
    assert b"SyntaxError" in result.stderr


@pytest.mark.parametrize("text", ["print('\ud800')", "print(1)\0", "(" * 10_000, "\x00" * 99])
def test_text_that_is_no_program_is_the_programs_fault(pool: Pool, text: str) -> None:
    """Were it a failure of the sandbox, a model could escape every verdict."""
    result = pool.run(text)
    assert result.status in (Status.RUNTIME, Status.MEMORY), result
    assert compile_cpp(text, run=pool.run).status not in (Status.OK, Status.INFRA)


def test_the_name_of_the_program_is_taken(pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"File name 'main.py'"):
        pool.run("pass", files={"main.py": b""})


def test_an_unknown_command_is_the_programs_fault(pool: Pool) -> None:
    result = pool.run(["./no-such-program"])
    assert result.status is Status.RUNTIME
    assert b"No such file" in result.stderr


def test_no_run_sees_what_another_left(pool: Pool) -> None:
    for _ in range(6):  # Every slot several times.
        result = pool.run(
            "import os\nprint(os.listdir('.'), os.listdir('/tmp'), os.listdir('/dev/shm'))\n"
            "for folder in ('.', '/tmp', '/dev/shm'): open(folder + '/left', 'w').write('x')"
        )
        assert result.stdout == b"['main.py'] [] []\n", result


def test_much_output_is_not_a_time_out(pool: Pool) -> None:
    result = pool.run("print('x' * 190_000)")
    assert (result.status, result.exit_code) == (Status.OUTPUT, 0)
    assert result.stdout == b"x" * (64 << 10)
    enough = pool.run("print('x' * 190_000)", limits=Limits(output_bytes=200_000))
    assert (enough.status, len(enough.stdout)) == (Status.OK, 190_001)


def test_the_limit_of_output_is_exact(pool: Pool) -> None:
    source = "import os; os.write(1, b'x' * 1000); os.write(2, b'y' * 1000)"
    assert pool.run(source, limits=Limits(output_bytes=1000)).status is Status.OK
    over = pool.run(source, limits=Limits(output_bytes=999))
    assert (over.status, over.stdout, over.stderr) == (Status.OUTPUT, b"x" * 999, b"y" * 999)


def test_much_input_is_fed_while_output_is_drained(pool: Pool) -> None:
    data = bytes(range(256)) * (4 * MB // 256)
    limits = Limits(output_bytes=8 * MB, wall_s=60, cpu_s=60)
    copied = pool.run(["/bin/cat"], stdin=data, limits=limits)
    assert (copied.status, copied.stdout == data) == (Status.OK, True)
    copy = "import shutil, sys; shutil.copyfileobj(sys.stdin.buffer, sys.stdout.buffer)"
    copied = pool.run(copy, stdin=data, limits=limits)
    assert (copied.status, copied.stdout == data) == (Status.OK, True)


def test_input_that_nobody_reads_is_no_failure(pool: Pool) -> None:
    assert pool.run("print(1)", stdin=bytes(4 * MB)).status is Status.OK
    assert pool.run(["/bin/true"], stdin=bytes(4 * MB)).status is Status.OK


def test_out_of_memory_by_its_own_account(pool: Pool) -> None:
    result = pool.run("raise MemoryError")
    assert (result.status, result.exit_code) == (Status.MEMORY, 1)
    assert pool.run("print('MemoryError')").status is Status.OK


def test_cpp_is_compiled_in_one_sandbox_and_run_in_another(pool: Pool) -> None:
    source = "#include <iostream>\nint main() { int n; std::cin >> n; std::cout << n + 1; }"
    built = compile_cpp(source, run=pool.run)
    assert built.status is Status.OK, built.stderr
    result = pool.run(["./main"], stdin=b"41", files={"main": built.stdout})
    assert (result.status, result.stdout) == (Status.OK, b"42")
    broken = compile_cpp("int main() {", run=pool.run)
    assert broken.status is Status.RUNTIME and b"error" in broken.stderr
    bomb = compile_cpp('#include "/dev/zero"', run=pool.run, limits=Limits(wall_s=5, cpu_s=5))
    assert bomb.status not in (Status.OK, Status.INFRA)
    assert compile_cpp('#include "/etc/passwd"', run=pool.run).status is Status.RUNTIME


@pytest.mark.parametrize(
    "name", ["/etc/x", "../x", "a/../../x", "", ".", "a/", "a\nb", "a\0b", "\ud800"]
)
def test_file_names_stay_in_the_work_folder(pool: Pool, name: str) -> None:
    with pytest.raises(ValueError, match="allowed is a path inside the work folder"):
        pool.run("pass", files={name: b""})


@pytest.mark.parametrize("command", [[], [""], ["a\0b"], ["true", "\ud800"]])
def test_commands_must_name_a_program(pool: Pool, command: list[str]) -> None:
    with pytest.raises(ValueError, match="allowed is a program and its arguments"):
        pool.run(command)


@pytest.mark.parametrize(
    "limits", [{"wall_s": 0}, {"cpu_s": -1}, {"wall_s": float("inf")}, {"memory_bytes": 1}]
)
def test_limits_are_checked(limits: dict) -> None:
    with pytest.raises(ValueError, match="Limits: "):
        Limits(**limits)


def test_a_result_goes_through_json() -> None:
    result = Result(Status.OK, 0, b"\xff1", b"", 0.1, 0.2, 3)
    values = json.loads(json.dumps(result.as_json()))
    assert values["status"] == "OK" and values["stdout"] == "\ufffd1" and values["wall_s"] == 0.2


def test_importing_it_is_light() -> None:
    code = "import sys, kimi_core.sandbox; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert out.stdout == b"set()\n"
