"""An OpenAI-compatible server that misbehaves as the judged response asks; prints its port.

python server.py [SECONDS]      # each answer takes that long
"""

import json
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DELAY_S = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
seen: dict[str, int] = {}
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked, images = body["messages"][0]["content"], []
        if isinstance(asked, list):
            images = [part["image_url"]["url"] for part in asked if part["type"] == "image_url"]
            asked = "".join(part["text"] for part in asked if part["type"] == "text")
        response = asked.split("<response>\n")[1].split("\n</response>")[0]
        word = response.split()[0] if response.split() else ""
        with lock:
            seen[response] = count = seen.get(response, 0) + 1
        time.sleep(DELAY_S)
        if word == "LATE" and count == 1:
            time.sleep(30)
        if word == "SILENT":
            time.sleep(30)
        if word in ("BUSY", "BROKEN") and count < 3:
            self.answer(429 if word == "BUSY" else 503, b"later", {"Retry-After": "7"})
        elif word == "DOWN":
            self.answer(503, b"down", {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"})
        elif word == "LONG":
            self.answer(400, b"context length exceeded")
        elif word == "KEY" and self.headers.get("Authorization") != "Bearer secret":
            self.answer(401, b"who are you?")
        elif word == "HTML":
            self.answer(200, b"<html>")
        elif word == "OTHER":
            self.answer(200, b'{"object": "list"}')
        elif word == "DEEP":
            self.answer(200, b"[" * 200_000)
        elif word in ("TRICKLE", "FLOOD"):
            self.send_response(200)
            self.send_header("Content-Length", "10000000000")
            self.end_headers()
            end = time.monotonic() + 30
            with suppress(OSError):
                while time.monotonic() < end:
                    self.wfile.write(b" " if word == "TRICKLE" else b" " * (1 << 20))
                    self.wfile.flush()
                    time.sleep(0.1 if word == "TRICKLE" else 0)
        elif word == "IMAGES":
            seen_here = json.dumps([images, asked.count("(image)")])
            self.complete(word, response, repair=False, thoughts=seen_here)
        elif word == "HANGUP":
            self.close_connection = True
        else:
            self.complete(word, response, repair=len(body["messages"]) > 1)

    def complete(self, word, response, *, repair, thoughts="Hm."):
        right = json.dumps({"correct": "42" in response})
        text, reason = f"I compare. {right}", "stop"
        if word == "CUT":
            reason = "length"
        if word in ("WORDS", "CUT"):
            text = right if repair else f"It seems so. {right} I think."
        if word == "NONSENSE":
            text = "la la la"
        if word == "PARTS":
            text = [{"type": "text", "text": text}]
        choice = {
            "message": {"content": text, "reasoning_content": thoughts},
            "finish_reason": reason,
        }
        self.answer(200, json.dumps({"choices": [choice]}).encode())

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
