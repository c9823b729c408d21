# `make demo` and `make test` are one command each on a fresh machine: both install first.
# PYTHON is the interpreter that creates .venv; FLAGS are passed to `openvision3 demo`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test check format test-slow bench results card clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "openvision3 needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch ..."
	$(PIP) install torch==2.13.0 -c constraints.txt
	@echo "installing openvision3 and its development tools ..."
	$(PIP) install -q -e '.[dev]' -c constraints.txt
	@touch $@

demo: setup
	$(BIN)/openvision3 demo $(FLAGS)

test: check

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist loadfile

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test-slow: setup
	$(BIN)/python -m pytest -m slow

bench: setup
	$(BIN)/python benchmarks/start_up.py
	$(BIN)/python benchmarks/vae_speed.py
	$(BIN)/python benchmarks/step_speed.py
	$(BIN)/python benchmarks/dit_speed.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scale.py
	test -z "$(CHAT)" || $(BIN)/python benchmarks/chat_speed.py $(CHAT)
	@test -n "$(SHARDS)" || echo "to time the reader and the latent cache too: make bench SHARDS='data/*.tar'"
	test -z "$(SHARDS)" || $(BIN)/python benchmarks/data_speed.py $(SHARDS)
	test -z "$(SHARDS)" || $(BIN)/python benchmarks/latents_speed.py $(SHARDS)

# The numbers of docs/results.md on the shipped mini and on the two branches: an hour or two. DATA is a folder with those of the SETS that you have;
# DRAWINGS is the folder of tools/named_drawings.py.
MEASURE := $(BIN)/openvision3 evaluate all mini --tokenizer simple --sigmas 0
LICENCE := CC BY-SA 4.0, attribution "OpenMoji - the open-source emoji and icon project" and the sources above
LICENCE_ID := cc-by-sa-4.0
SETS    := pictures flowers_ccby grocery_mit trashnet_mit flickr8k imagenette photos
ABLATE  := --steps 100 --captions 1 --no-aliases --no-sentences --compile off --out results/ablations

results: setup
	$(MEASURE) --data openmoji --count 256 --out results/openmoji
	@test -n "$(DATA)" || echo "OpenMoji alone is measured. For more: make results DATA=FOLDER, with SET/train-*.tar and SET/val-*.tar in it; SET is one of $(SETS)"
	test ! -d "$(DATA)/pictures" || $(MEASURE) --data '$(DATA)/pictures/val-*.tar' --train '$(DATA)/pictures/train-*.tar' --label-key category --out results/pictures
	test ! -d "$(DATA)/photos" || $(MEASURE) --data '$(DATA)/photos/val-*.tar' --label-key category --out results/photos
	test -z "$(DRAWINGS)" || $(MEASURE) --data '$(DRAWINGS)/*-unseen_*.tar' '$(DRAWINGS)/*-seen_concept-*.tar' --out results/drawings
	for set in flowers_ccby grocery_mit trashnet_mit; do test ! -d "$(DATA)/$$set" || $(MEASURE) --data "$(DATA)/$$set/val-*.tar" \
	  --train "$(DATA)/$$set/train-*.tar" --label-key category --prompts captions --out results/$$set || exit 1; done
	test ! -d "$(DATA)/flickr8k" || $(MEASURE) --data '$(DATA)/flickr8k/val-*.tar' --caption-keys captions --out results/flickr8k
	test ! -d "$(DATA)/imagenette" || $(MEASURE) --data '$(DATA)/imagenette/val-*.tar' --label-key category --out results/imagenette
	$(BIN)/openvision3 evaluate table results/*/results.json --out results/summary.html
	$(BIN)/openvision3 ablate synergy $(ABLATE)
	$(BIN)/openvision3 ablate balance $(ABLATE)

# The cards of the shipped mini and its VAE, from the results of `make results` and from held-out data that may be shown. TRAIN: the training data; SHOW: NAME=DATA of each.
card: setup
	@test -n "$(TRAIN)$(SHOW)" || echo "without TRAIN='openmoji DRAWINGS/*-train-*.tar' and SHOW='openmoji=openmoji drawings=DRAWINGS/*_*-*.tar' the card shows no images and no sources"
	set -f; $(BIN)/python tools/card.py mini --results $(wildcard results/openmoji results/drawings $(SETS:%=results/%)) \
	  $(if $(TRAIN),--train $(TRAIN)) $(if $(SHOW),--show $(SHOW) --strip docs/rebuilt.png) --licence '$(LICENCE)' --licence-id '$(LICENCE_ID)' --images docs/card --out src/openvision3/assets/mini/README.md --vae-out src/openvision3/assets/vae/README.md --only 'source!=stamps' --terms 'clipart=public domain'

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist
