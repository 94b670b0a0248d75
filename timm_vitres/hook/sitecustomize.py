"""Python runs this at its start where PYTHONPATH names this folder: importing timm then registers our models, too.

The folder is no package: `scripts` puts it into PYTHONPATH, which a process hands on to those that it starts. A process
that never imports timm pays for one finder in `sys.meta_path`, and imports nothing for it.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = os.path.basename(os.path.dirname(HERE))
ROOT = os.path.dirname(os.path.dirname(HERE))


class Door:
    """A finder for `sys.meta_path`: timm is found as it is without it, and our models are registered after it."""

    def find_spec(self, name, path=None, target=None):
        """Return how a module is imported; None, for other finders to answer, unless it is timm or our package."""
        if name == PACKAGE:
            return self.ask_others(name, [ROOT], target)  # every process has the models of the one that began
        if name != 'timm':
            return None
        spec = self.ask_others(name, path, target)
        if spec is not None and hasattr(spec.loader, 'exec_module'):
            self.extend(spec.loader)
        return spec

    def ask_others(self, name, path, target):
        """Return what the first of the other finders says."""
        for finder in tuple(sys.meta_path):
            if finder is not self and hasattr(finder, 'find_spec'):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    return spec
        return None

    def extend(self, loader):
        """Let timm's loader register our models, once; it is as it was before timm's first line runs."""

        def exec_module(module):
            del loader.exec_module
            loader.exec_module(module)
            register(module)

        loader.exec_module = exec_module


def register(timm):
    """Import our package; what goes wrong is a warning, for this may be an environment that it is not meant for."""
    try:
        __import__(PACKAGE)
    except Exception as error:
        import warnings

        which = f'timm {getattr(timm, "__version__", "")} ({timm.__file__})'  # it may be a folder beside the script
        warnings.warn(
            f'{which} does not know the models of {PACKAGE}, which can not be imported: {error}', stacklevel=3
        )


def run_hidden():
    """Run the `sitecustomize` that this one hides, if there is one, and leave `sys.path` as it is without ours."""
    ours = sys.modules.pop('sitecustomize', None)
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != HERE]
    try:
        import sitecustomize  # noqa: F401
    except ImportError as error:
        if error.name != 'sitecustomize':
            raise
    finally:
        if ours is not None:
            sys.modules.setdefault('sitecustomize', ours)


if __name__ == 'sitecustomize':
    sys.meta_path.insert(0, Door())
    run_hidden()
