"""`sample.py --rank` in a browser instead of at the keyboard: one plain page, served to this machine alone.

    python sample.py --serve --config tiny --rank mine.jsonl --stage sft --temperature 1

The page is rank_page.html beside this file; Ctrl-C ends.
"""
import http.server
import json
import secrets
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from sample import parse_ranking, say  # noqa: E402


def browser():
    """Serves rank_page.html to this machine -> ask(place, text, shown) -> ranks, `sample.keyboard` in a browser."""
    page, asked, ranks = Path(__file__).with_name("rank_page.html").read_bytes(), ["", "", []], []

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout, log_message = 0.5, lambda *args: None      # seconds: browsers keep spare connections open

        def do_GET(self):
            line = self.rfile.read(min(int(self.headers.get("Content-Length", 0)), 99)).decode()
            replies = {f"GET {home}": page, f"GET {home}question": json.dumps(asked).encode(),
                       f"POST {home}{asked[0]}": b""}       # a tab that is late names another place
            wanted = f"{self.command} {self.headers['Host']}{self.path}"
            if wanted not in replies:
                return self.send_error(403)
            if self.command == "POST":
                ranks[:] = parse_ranking(line, len(asked[2]))
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if replies[wanted] is page else "application/json")
            self.end_headers()
            self.wfile.write(replies[wanted])
        do_POST = do_GET

    def ask(*question):
        asked[:], ranks[:] = question, []
        while not ranks:                        # one request at a time; while the model writes, they wait
            server.handle_request()
        return ranks
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None    # nonsense, or a tab that is closed: only its connection ends
    # Another site in that browser cannot guess the token; if its own name leads here, it sends that as Host.
    home = f"127.0.0.1:{server.server_port}/{secrets.token_urlsafe()}/"
    say(f"open http://{home} in a browser on this machine; Ctrl-C here ends")
    return ask
