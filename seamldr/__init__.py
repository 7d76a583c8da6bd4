"""The SEAM side, the lock service, the kernel's `seamldr_call` and the module update. Imports `cpu`, `bus`."""
