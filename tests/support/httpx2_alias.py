"""A pytest plugin that puts httpx2 in httpx's place, before anything imports either."""

import httpx2

httpx2.alias_httpx()
