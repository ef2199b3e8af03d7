#!/usr/bin/env python3
import json, sys

with open(sys.argv[1], "a") as journal:
    for line in sys.stdin:
        event = json.loads(line)
        answer = {"id": event["id"], "ok": True}
        try:
            print(event["payload"], file=journal, flush=True)  # the work
        except OSError as e:
            answer = {"id": event["id"], "error": str(e)}  # comes again
        print(json.dumps(answer), flush=True)
