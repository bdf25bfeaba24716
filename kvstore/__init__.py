"""The KV format and where it lies: frames, manifests, the names they are stored under, and stores. Free of torch.

identity.py   who a frame belongs to, and every key name
envelope.py   what frames and manifests share on the wire: magic, version, length, checksum
frame.py      tensors of one sequence as one message or one stored value
manifest.py   what a whole sequence consists of; written last
continuation.py   how far a sequence has come beyond its prompt
session.py    conversations that are continued by their id
sequences.py  how a sequence lies in a store: written by its owner, found and taken over by another
images.py     memory of running requests that a worker puts away for a while
store.py      what a store must do      memory.py   a store inside the process
"""
