"""The sampling side: a Protocol and its backend vllm/."""
