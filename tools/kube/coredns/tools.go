//go:build tools

package tools

import _ "coredns-build/coredns"
