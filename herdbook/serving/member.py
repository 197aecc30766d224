"""``python -m herdbook.serving.member``: one worker process of `herd serve --workers N`.

Its settings come as one line of JSON on stdin, where no other process can read them. When stdin ends,
the controller is gone, however it ended, and so is the worker.
"""

from __future__ import annotations

import json
import os
import sys
import threading

from herdbook.errors import HerdbookError
from herdbook.serving.server import serve_member
from herdbook.serving.setup import Setup


def main() -> int:
    settings = json.loads(sys.stdin.readline())

    def watch() -> None:
        while os.read(0, 4096):  # not sys.stdin, whose lock would be held at the end
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        secret, host = settings.pop("secret"), settings.pop("host")
        serve_member(Setup(**settings), secret, host)
    except HerdbookError as error:
        print(f"herd: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
