#!/bin/sh
# The fields are always in the order id, channel, payload, attempt. An id needs no escapes.
# The payload here is still JSON; where jq is installed, jq -r .payload reads it.
while IFS= read -r line; do
	id=${line#'{"id":"'} id=${id%%'"'*}
	payload=${line#*'"payload":"'} payload=${payload%'","attempt":'*}
	if printf '%s\n' "$payload" >>"$1"; then # the work
		printf '{"id":"%s","ok":true}\n' "$id"
	else
		printf '{"id":"%s","error":"cannot append","unavailable":true}\n' "$id" # comes again
	fi
done
