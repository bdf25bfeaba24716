"""The KV format and where it lies: frames, manifests, the names they are stored under, and stores. Free of torch.

identity.py   who a frame belongs to, and every key name
envelope.py   what frames and manifests share on the wire: magic, version, length, checksum
frame.py      tensors of one sequence as one message or one stored value
manifest.py   what a whole sequence consists of; written last
store.py      what a store must do      memory.py   a store inside the process
"""
