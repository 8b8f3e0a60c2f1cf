"""A small Hugging Face Hub on loopback, for tests and rehearsals of uploads.

The real ``huggingface_hub`` client talks to it, so what is exercised is the client's own code with nothing patched.
Everything lives in memory. The client reads its endpoint when it is imported, so this package has to be usable before
that: it imports the standard library and its own files, these by relative names only, and can be loaded by path where
`import manticore_hf` would come too early.

Files are stored as on the Hub: small ones as git blobs, large ones through Git LFS. The Xet protocol is not spoken,
which is why :meth:`LocalHub.environment` switches it off in the client.

Any bearer token is accepted as the user ``tester``; a private or gated repo opens only to the token that created it.
"""

from .hub import TOKEN, LocalHub

__all__ = ["TOKEN", "LocalHub"]
