// The store of the API server: etcd as its own program would run, whose module cannot be installed by itself.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() {
	etcdmain.Main(os.Args)
}
