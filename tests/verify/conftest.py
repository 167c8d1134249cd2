"""What lies in ``template`` becomes tests only in a copy of the sources: see test_template.py."""

collect_ignore = ["template"]
