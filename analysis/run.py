"""Run the study's notebooks: measure, record where each number comes from, skip what is up to date.

python analysis/run.py --profile pocket                 # every chapter that measures, with small samples
python analysis/run.py --profile pocket-full --draw     # every chapter, drawn from the rows of the reference run
python analysis/run.py --profile smoke --only 01 --force
python analysis/run.py --profile my_photos.yaml         # a parameter file of your own
python analysis/run.py --profile pocket --check         # measure anew, compare with the committed results
python analysis/run.py --profile llava-7b --yes         # do not ask before hours of work
"""

import sys

from study.runner import main

if __name__ == "__main__":
    sys.exit(main(description=__doc__))
