import os

# Sub-processes of the tests must find the checkout as this process does.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
os.environ['PYTHONPATH'] = os.pathsep.join(
    [ROOT] + [p for p in [os.environ.get('PYTHONPATH')] if p]
)
