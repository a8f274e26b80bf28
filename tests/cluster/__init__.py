"""The test bed: a real Kubernetes of several nodes on one Linux machine, in plain standard library.

Other tests use three rooms of it: ``binaries`` (the programs), ``control_plane`` (etcd and an API server
alone, for integration tests) and ``faults`` (what can go wrong in the whole cluster, for end-to-end tests).
``docs/how-to/test-bed.md`` says how it is built.
"""
