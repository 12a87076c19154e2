# shellcheck shell=bash
# Sourced by the scripts: where -h or --help is among a script's own arguments (those after -- are another's), prints the
# comment at the script's head and ends it with exit code 0.

for word in "$@"; do
  case "$word" in
    --) break ;;
    -h | --help)
      awk 'NR == 1 && /^#!/ {next} /^# shellcheck/ {next} !/^#/ {exit} {sub(/^# ?/, ""); print}' "${BASH_SOURCE[1]:-$0}"
      exit 0
      ;;
  esac
done
