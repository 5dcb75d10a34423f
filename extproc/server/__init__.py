"""The edge: the only place where grpc and protobuf are known. Open `app` for how a worker is put together."""
