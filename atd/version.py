"""The version of atd: part of what resumes, caches and manifests depend on."""

__version__ = "0.1.0"
