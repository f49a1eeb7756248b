"""What a deploy script does with curl: one request to Consul, with the id left to Consul."""

import json
import os
import urllib.request

port = int(os.environ["SERVICE_PORT"])
check = {"HTTP": f"http://127.0.0.1:{port}/health", "Interval": "1s", "Status": "passing"}
entry = {"Name": os.environ["SERVICE_NAME"], "Address": "127.0.0.1", "Port": port, "Check": check}
url = f"http://{os.environ['CONSUL_HTTP_ADDR']}/v1/agent/service/register"
request = urllib.request.Request(url, json.dumps(entry).encode(), method="PUT")
urllib.request.urlopen(request, timeout=5).close()
