"""The server as others reach it: over HTTP, in its own process."""

import http.client
import json
import socket
from urllib.parse import urlsplit

import hostile_images
import pytest

from kimi_core import cli


def ask(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, dict, bytes]:
    """Status, headers and body of a request for exactly ``path``; no client mends it."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def data(address: str, path: str) -> object:
    status, _, body = ask(address, f"/data/runs{path}")
    assert status == 200, body
    return json.loads(body)


def test_every_question_has_an_answer(served, trained):
    names = ["deep/hostile", "made", "pictured", "tiny"]
    assert [run["name"] for run in data(served, "")["runs"]] == names
    assert data(served, "/tiny/settings")["rollout.token_budget"] == 5
    assert data(served, "/tiny/iterations") == [1, 2, 3]
    columns = data(served, "/tiny/iterations/3")["columns"]
    one, group = columns["trajectory_id"][0], columns["group_id"][0]
    assert data(served, f"/tiny/iterations/3/responses/{one}")["trajectory_id"] == one
    assert data(served, f"/tiny/iterations/3/groups/{group}")["group_id"] == group
    row = data(served, "/tiny/buffer")["rows"][0]
    assert data(served, f"/tiny/buffer/{row['trajectory_id']}")["group_id"] == row["group_id"]
    assert data(served, "/tiny/prompts")["is_recorded"]
    assert data(served, "/deep/hostile/iterations") == [1]


def test_metrics_come_from_where_the_last_answer_ended(served, trained):
    first = data(served, "/tiny/metrics")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert first["lines"] == lines
    again = data(served, f"/tiny/metrics?epoch={first['epoch']}&after={len(lines) - 1}")
    assert (again["start"], again["lines"]) == (len(lines) - 1, lines[-1:])
    other = data(served, "/tiny/metrics?epoch=7&after=3")
    assert other["lines"] == lines
    assert data(served, "/tiny/metrics?epoch=x&after=-9999999999999")["lines"] == lines


@pytest.mark.parametrize("path", ["/", "/app.js", "/data/runs", "/nothing", "/data/runs/x/metrics"])
def test_every_answer_has_the_headers_that_keep_texts_inert(served, path):
    _, headers, _ = ask(served, path)
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "require-trusted-types-for 'script'" in policy and "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.0.1", ""])
def test_another_host_name_is_refused(served, host):
    status, _, body = ask(served, "/data/runs", Host=host)
    assert status == 400 and b"tiny" not in body


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1234"])
def test_loopback_by_name_is_served(served, host):
    assert ask(served, "/data/runs", Host=host)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../server.py",
        "/%2e%2e/server.py",
        "/..%2fserver.py",
        "/pages/../../server.py",
        "//etc/passwd",
        "/data/runs/../metrics",
        "/data/runs/..%2f..%2fetc/settings",
        "/data/runs/tiny/../../settings",
        "/data/runs/tiny%00/settings",
        "/data/runs/tiny/iterations/-1",
        "/data/runs/tiny/iterations/99999999999999999999",
        "/data/runs/tiny/iterations/1/responses/..%2f..%2f..%2fconfig.toml",
    ],
)
def test_paths_that_lead_out_find_nothing(served, path):
    status, _, body = ask(served, path)
    assert status == 404, body
    assert b"import" not in body and b"root:" not in body


@pytest.mark.parametrize("name", hostile_images.SHOWN)
def test_an_image_has_a_fixed_type(served, name):
    path = f"/data/runs/pictured/images/{hostile_images.digest(name)}.png"
    status, headers, body = ask(served, path)
    assert (status, body) == (200, hostile_images.SHOWN[name])
    assert headers["content-type"] == "image/png"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert ask(served, path, "POST")[0] == 405


@pytest.mark.parametrize("name", hostile_images.NAMES)
def test_what_no_run_writes_is_not_given_out(served, name):
    path = f"/data/runs/pictured/images/{hostile_images.digest(name)}.png"
    status, headers, body = ask(served, path)
    assert status == (500 if name in hostile_images.HOSTILE or name == "pipe" else 404)
    assert headers["content-type"] == "application/json" and "error" in json.loads(body)


@pytest.mark.parametrize("name", ["..%2fconfig", "x", f"{'A' * 64}", f"{'0' * 64}%0a", "%2e%2e"])
def test_only_a_sha_256_names_an_image(served, name):
    assert ask(served, f"/data/runs/pictured/images/{name}.png")[0] == 404


def test_a_response_names_images_by_sha_256_alone(served):
    expected = [hostile_images.digest(one) for one in hostile_images.ORDER]
    response = data(served, "/pictured/iterations/1/responses/0")
    group = data(served, "/pictured/iterations/1/groups/0")
    assert response["images"] == group["responses"][0]["images"] == expected


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed(served, method):
    assert ask(served, "/data/runs", method)[0] == 405


def test_errors_are_json_that_says_what_is_missing(served):
    status, _, body = ask(served, "/data/runs/made/buffer")
    assert status == 404
    assert json.loads(body)["error"] == ("made has no buffer.bin: its first rollout has not begun")


def test_a_damaged_file_is_an_error_and_not_the_end(served, trained):
    path = trained.parent / "made" / "buffer.bin"
    path.write_bytes(b"x" * 5000)
    try:
        status, _, body = ask(served, "/data/runs/made/buffer")
    finally:
        path.unlink()
    assert status == 500 and json.loads(body)["error"].startswith("ValueError")
    assert ask(served, "/data/runs")[0] == 200


def test_a_port_that_is_taken_and_a_folder_that_is_not_there(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["dashboard", str(tmp_path), "--port", str(port)]) == 2
    assert f"Cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert cli.main(["dashboard", str(tmp_path / "x")]) == 2
    assert "x is not a folder: give the folder of a run" in capsys.readouterr().err
