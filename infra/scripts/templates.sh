# Sourced by the other scripts: where things are, and templates with ${NAMES} in them.
# shellcheck shell=bash

infra_path="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

fail() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# environment_of NAME: the name, if there is such an environment.
environment_of() {
  [[ -n "${1:-}" && -f "$infra_path/terraform/envs/$1.tfvars" ]] ||
    fail "environment: got '${1:-}'; give one of: $(cd "$infra_path/terraform/envs" && echo *.tfvars | sed 's/\.tfvars//g')"
  echo "$1"
}

# fill TEMPLATE VALUES...: the template on standard output, with ${NAME} replaced by the values of the files, the last one
# first. A name that no file knows is an error: nothing half filled in reaches a cluster.
fill() {
  local template="$1" text line missing
  shift
  text="$(grep -v '^#' "$template")"
  # Twice, because a value may hold a name itself.
  for _ in 1 2; do
    while IFS= read -r line; do
      [[ "$line" =~ ^([A-Z][A-Z0-9_]*)=(.*)$ ]] || continue
      text="${text//"\${${BASH_REMATCH[1]}}"/"${BASH_REMATCH[2]}"}"
    done < <(for file in "$@"; do tac "$file"; done)
  done
  # shellcheck disable=SC2016 # names in single quotes are meant as they stand
  missing="$({ grep -o '\${[A-Z][A-Z0-9_]*}' <<<"$text" || true; } | sort -u | tr -d '${}' | tr '\n' ' ')"
  [[ -z "$missing" ]] || fail "$(basename "$template"): no value for $missing; set it in $(basename "${!#}"), or give NAME=value"
  printf '%s\n' "$text"
}
