"""titan_hd: an FSDP2 trainer for HD-PiSSA and the adapter methods it is compared with."""

__version__ = "0.1.0"
