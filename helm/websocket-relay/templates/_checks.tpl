{{- /*
Values that are valid each, and contradict each other. All problems are reported together; each line names
the values and what to do. The range of a single value is in values.schema.json.
*/ -}}
{{- define "websocket-relay.checks" -}}
{{- with include "websocket-relay.problems" . | fromJsonArray -}}
{{- printf "\nThese values do not fit together:\n- %s\n" (join "\n- " .) | fail -}}
{{- end -}}
{{- end -}}

{{- /* One sentence for each, as a JSON list. */ -}}
{{- define "websocket-relay.problems" -}}
{{- $problems := list -}}
{{- range list "names" "replicas" "stop" "secrets" "access" "tls" "addresses" "tokens" "ways" "resources" "scraping" "budgets" "network" "environment" -}}
{{- range splitList "\n" (include (printf "websocket-relay.checks.%s" .) $) -}}
{{- if trim . -}}
{{- $problems = append $problems (trim .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- toJson $problems -}}
{{- end -}}

{{- define "websocket-relay.checks.names" -}}
{{- $fullname := include "websocket-relay.fullname" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $fullname) }}
the release's name and nameOverride result in objects named {{ $fullname }}, and a Service's name begins with a letter and contains only a-z, 0-9 and -; set fullnameOverride to such a name
{{- end }}
{{- range $labels := list "podLabels" "commonLabels" }}
{{- range $label, $_ := include "websocket-relay.selectorLabels" $ | fromYaml }}
{{- if hasKey (default dict (get $.Values $labels)) $label }}
{{ $labels }} has {{ $label }}, by which the Service and other objects select the pods; leave it out, or set nameOverride
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.replicas" -}}
{{- $alone := eq (include "websocket-relay.backplane" .) "memory" -}}
{{- $scaler := and .Values.autoscaling.enabled .Values.autoscaling.create }}
{{- with .Values.autoscaling }}
{{- if and .enabled $alone (gt (int .maxReplicas) 1) }}
autoscaling.maxReplicas is {{ int .maxReplicas }} and config.backplane.url is memory://, so the replicas would not exchange messages; set config.backplane.url to a Redis or NATS, or secrets.backplaneUrl.name to a Secret with its address
{{- end }}
{{- if and $scaler (gt (int .minReplicas) (int .maxReplicas)) }}
autoscaling.minReplicas is {{ int .minReplicas }} and autoscaling.maxReplicas {{ int .maxReplicas }}; set the first to less or the second to more
{{- end }}
{{- if and $scaler (not .targetCPUUtilizationPercentage) (not .targetConnectedClients) (not .metrics) }}
autoscaling.enabled is true and none of autoscaling.targetCPUUtilizationPercentage, autoscaling.targetConnectedClients and autoscaling.metrics is set; set one of them
{{- end }}
{{- if and $scaler .targetCPUUtilizationPercentage (not (dig "requests" "cpu" "" (default dict $.Values.resources))) }}
autoscaling.targetCPUUtilizationPercentage is a percentage of resources.requests.cpu, which is not set; set it, or the first to 0
{{- end }}
{{- if and $scaler .targetConnectedClients (not $.Values.config.metrics.enabled) }}
autoscaling.targetConnectedClients is read from the metrics and config.metrics.enabled is false; set that to true, or the first to 0
{{- end }}
{{- end }}
{{- if and (not .Values.autoscaling.enabled) $alone (gt (int .Values.replicaCount) 1) }}
replicaCount is {{ int .Values.replicaCount }} and config.backplane.url is memory://, so the replicas would not exchange messages; set config.backplane.url to a Redis or NATS, or secrets.backplaneUrl.name to a Secret with its address
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.stop" -}}
{{- $shutdown := .Values.config.shutdown -}}
{{- $grace := include "websocket-relay.gracePeriod" . | float64 -}}
{{- /* A fifth of the time is for the closing handshakes, half a second for the exit (docs/explanation/scaling.md). */ -}}
{{- $needed := addf $shutdown.readiness_delay_s (mulf 1.25 $shutdown.spread_s) 0.5 -}}
{{- if le $grace (float64 $shutdown.timeout_s) }}
terminationGracePeriodSeconds is {{ $grace }} and config.shutdown.timeout_s {{ $shutdown.timeout_s }}, so the relay would be killed while it drains; leave terminationGracePeriodSeconds empty, or set it to more
{{- end }}
{{- if gt $needed (float64 $shutdown.timeout_s) }}
config.shutdown.timeout_s is {{ $shutdown.timeout_s }}, which is too short for config.shutdown.readiness_delay_s ({{ $shutdown.readiness_delay_s }}) and config.shutdown.spread_s ({{ $shutdown.spread_s }}), so clients would be aborted; set it to {{ ceil $needed }} or more
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.secrets" -}}
{{- $url := .Values.config.backplane.url -}}
{{- /* Neither address is printed: it may contain a password. The relay checks its address in the same way. */ -}}
{{- $server := printf `([A-Za-z0-9._-]+|\[%s\])(:[0-9]+)?` (include "websocket-relay.ipv6" .) -}}
{{- $servers := printf "%s(,%s)*" $server $server -}}
{{- $user := `client_name=[^&]*|username=[^&]*` -}}
{{- $ssl := `|ssl_(ca_certs|ca_path|certfile|keyfile)=[^&]*|ssl_cert_reqs=(none|optional|required)|ssl_check_hostname=(true|false)` -}}
{{- $redis := printf `[?&](%s|db=[0-9]{1,9})` $user -}}
{{- $rediss := printf `[?&](%s|db=[0-9]{1,9}%s)` $user $ssl -}}
{{- $cluster := printf `[?&](%s|db=0)` $user -}}
{{- $clusters := printf `[?&](%s|db=0%s)` $user $ssl -}}
{{- $sentinel := printf `[?&](%s|sentinel_username=[^&]*|db=[0-9]{1,9})` $user -}}
{{- $sentinels := printf `[?&](%s|sentinel_username=[^&]*|db=[0-9]{1,9}%s)` $user $ssl -}}
{{- $nats := `[?&](replicas=[135]|ssl_(ca_certs|certfile|keyfile)=[^&]*)` -}}
{{- $tls := `[?&](replicas=[135]|handshake_first=(true|false)|ssl_(ca_certs|certfile|keyfile)=[^&]*)` -}}
{{- $forms := list
  `memory://`
  `unix:///[^?]+`
  (printf `(redis|valkey)://%s(/[0-9]{0,9})?(%s)*` $server $redis)
  (printf `(rediss|valkeys)://%s(/[0-9]{0,9})?(%s)*` $server $rediss)
  (printf `(redis|valkey)[+]cluster://%s(/0?)?(%s)*` $servers $cluster)
  (printf `(rediss|valkeys)[+]cluster://%s(/0?)?(%s)*` $servers $clusters)
  (printf `(redis|valkey)[+]sentinel://%s/[^/?]+(/[0-9]{0,9})?(%s)*` $servers $sentinel)
  (printf `(rediss|valkeys)[+]sentinel://%s/[^/?]+(/[0-9]{0,9})?(%s)*` $servers $sentinels)
  (printf `nats://%s/?(%s)*` $servers $nats)
  (printf `tls://%s/?(%s)*` $servers $tls)
-}}
{{- $port := 0 -}}
{{- range include "websocket-relay.brokerPorts" . | fromJsonArray -}}
{{- $port = max $port (int .) -}}
{{- end -}}
{{- $isSecret := or (contains "@" $url) (regexMatch "[?&][^=&]*pass[^=&]*=" $url) -}}
{{- if and (not $isSecret) (or (gt (int $port) 65535) (not (regexMatch (printf "^(%s)$" (join "|" $forms)) $url))) }}
config.backplane.url is not the address of a broker that the relay supports; set it to one like redis://redis:6379/0, rediss+sentinel://one:26379,two:26379/mymaster/0, redis+cluster://one:6379,two:6379 or nats://one:4222,two:4222?replicas=3
{{- end }}
{{- $keys := .Values.config.auth.jwt.jwks_url -}}
{{- if and $keys (not (regexMatch (printf `^https?://([A-Za-z0-9._~-]+|\[%s\])(:%s)?([/?#][!-~]*)?$` (include "websocket-relay.ipv6" .) (include "websocket-relay.portNumber" .)) $keys)) }}
config.auth.jwt.jwks_url is not a valid address; set it to one like https://issuer.example.com/jwks.json, without a user or a password
{{- end }}
{{- range $setting, $url := dict "auth.hook.url" .Values.config.auth.hook.url "hooks.url" .Values.config.hooks.url }}
{{- if and $url (not (regexMatch (printf `^https?://([A-Za-z0-9._~-]+|\[%s\])(:%s)?([/?#][!-~]*)?$` (include "websocket-relay.ipv6" $) (include "websocket-relay.portNumber" $)) $url)) }}
config.{{ $setting }} is not a valid address; set it to one like https://app.example.com/relay, without a user or a password
{{- end }}
{{- end }}
{{- if $isSecret }}
config.backplane.url contains a user or a password, which would be readable in the pod; put the address into a Secret, set secrets.backplaneUrl.name to it and leave config.backplane.url at its default
{{- end }}
{{- if and .Values.secrets.backplaneUrl.name (ne $url "memory://") }}
config.backplane.url and secrets.backplaneUrl.name both set the broker's address; leave one of them out
{{- end }}
{{- if dig "password" "" .Values.config.backplane }}
config.backplane.password is set, and would be readable in the pod; put it into a Secret, set secrets.backplanePassword.name to that and leave config.backplane.password empty
{{- end }}
{{- if .Values.config.hooks.secret }}
config.hooks.secret is set, and would be readable in the pod; put it into a Secret, set secrets.hooksSecret.name to that and leave config.hooks.secret empty
{{- end }}
{{- range $setting, $value := dict "secret" "jwtSecret" "secrets" "jwtSecrets" }}
{{- if get $.Values.config.auth.jwt $setting }}
config.auth.jwt.{{ $setting }} is set, and would be readable in the pod; put it into a Secret, set secrets.{{ $value }}.name to that and leave this empty
{{- end }}
{{- end }}
{{- if dig "key" "" .Values.config.api }}
config.api.key is set, and would be readable in the pod; put it into a Secret, set secrets.apiKey.name to that and leave config.api.key empty
{{- end }}
{{- end -}}

{{- /* What check_access of the relay refuses. If the broker's address is in a Secret, its scheme is unknown. */ -}}
{{- define "websocket-relay.checks.access" -}}
{{- $config := .Values.config.backplane -}}
{{- $scheme := include "websocket-relay.backplane" . -}}
{{- $isNats := has $scheme (list "nats" "tls") -}}
{{- $ways := dict "backplanePassword" "password_file" "backplaneCreds" "creds_file" "backplaneNkey" "nkey_file" -}}
{{- $parameters := dict "ca_file" "ssl_ca_certs" "cert_file" "ssl_certfile" "key_file" "ssl_keyfile" -}}
{{- $given := dict -}}
{{- range concat (list "username" "domain" "inbox_prefix") (values $ways) (keys $parameters) -}}
{{- if get $config . -}}
{{- $_ := set $given . (printf "config.backplane.%s" .) -}}
{{- end -}}
{{- end -}}
{{- range $value, $setting := $ways -}}
{{- if get $.Values.secrets $value | dig "name" "" -}}
{{- $_ := set $given $setting (printf "secrets.%s.name" $value) -}}
{{- end -}}
{{- end -}}
{{- if .Values.tls.caSecretName -}}
{{- $_ := set $given "ca_file" "tls.caSecretName" -}}
{{- end -}}
{{- if .Values.tls.clientSecretName -}}
{{- $given = set (omit $given "key_file") "cert_file" "tls.clientSecretName" -}}
{{- end -}}
{{- range $setting, $name := $given }}
{{- $parameter := get $parameters $setting }}
{{- if eq $scheme "memory" }}
{{ $name }} is set and config.backplane.url is memory://, so there is no broker; set the address of one, or leave {{ $name }} empty
{{- else if and $scheme (not $isNats) (has $setting (list "creds_file" "nkey_file" "domain" "inbox_prefix")) }}
{{ $name }} is set, which only NATS has, and config.backplane.url is another broker; leave {{ $name }} empty
{{- else if and $scheme $parameter (not (regexMatch "^(tls$|rediss|valkeys)" $scheme)) }}
{{ $name }} is set, which needs TLS, and config.backplane.url begins with {{ $scheme }}://; set it to an address that begins with {{ ternary "tls" "rediss" $isNats }}://, or leave {{ $name }} empty
{{- else if and $parameter (contains (printf "%s=" $parameter) $config.url) }}
{{ $name }} is set and config.backplane.url has {{ $parameter }}; leave one of them out
{{- end }}
{{- end }}
{{- $credentials := list }}
{{- range values $ways | sortAlpha }}
{{- with get $given . }}
{{- $credentials = append $credentials . }}
{{- end }}
{{- end }}
{{- if and (ne $scheme "memory") (gt (len $credentials) 1) }}
{{ join " and " $credentials }} are set, and a broker takes one of them; leave the others empty
{{- end }}
{{- if and (ne $scheme "memory") $given.username (not $given.password_file) }}
config.backplane.username is {{ $config.username }} and there is no password; set secrets.backplanePassword.name to a Secret with it, or leave the user empty
{{- end }}
{{- if and (regexMatch "[?&]username=" $config.url) (or $given.username $credentials) }}
config.backplane.url has a user and {{ $given.username | default (first $credentials) }} is set; set config.backplane.username to the user and leave it out of the address
{{- end }}
{{- if and (regexMatch "[?&]ssl_keyfile=[^&]" $.Values.config.backplane.url) (not (regexMatch "[?&]ssl_certfile=[^&]" $.Values.config.backplane.url)) (not $given.cert_file) }}
config.backplane.url has ssl_keyfile and no ssl_certfile; set both or neither
{{- end }}
{{- if and (ne $scheme "memory") $given.key_file (not $given.cert_file) }}
config.backplane.key_file is set and config.backplane.cert_file is empty; set both or neither
{{- end }}
{{- if and $isNats (not (regexMatch `^[^ .*>/\\]{1,255}$` $config.stream)) }}
config.backplane.stream is {{ $config.stream }} and config.backplane.url is a NATS, whose streams have no space . * > / or \ in their names; set config.backplane.stream to another name
{{- end }}
{{- end -}}

{{- define "websocket-relay.ipv4" -}}
{{- $byte := `(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])` -}}
{{- printf `%s([.]%s){3}` $byte $byte -}}
{{- end -}}

{{- define "websocket-relay.ipv6" -}}
{{- $group := `[0-9A-Fa-f]{1,4}` -}}
{{- $forms := list (printf `(%s:){7}%s` $group $group) (printf `(%s:){1,7}:` $group) (printf `:(:%s){1,7}` $group) `::` -}}
{{- range untilStep 1 7 1 -}}
{{- $forms = append $forms (printf `(%s:){1,%d}(:%s){1,%d}` $group (sub 7 .) $group .) -}}
{{- end -}}
{{- printf `(%s|::([Ff]{4}:)?%s)` (join "|" $forms) (include "websocket-relay.ipv4" .) -}}
{{- end -}}

{{- define "websocket-relay.portNumber" -}}
(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})
{{- end -}}

{{- /* Not empty: an address, or a network of which only the first bits are set. */ -}}
{{- define "websocket-relay.isNetwork" -}}
{{- $address := regexFind "^[^/]*" . -}}
{{- $isV4 := regexMatch (printf "^%s$" (include "websocket-relay.ipv4" .)) $address -}}
{{- $width := ternary 8 16 $isV4 -}}
{{- $length := regexFind "[^/]+$" . | int -}}
{{- if not (contains "/" .) -}}
{{- $length = ternary 32 128 $isV4 -}}
{{- end -}}
{{- $isValid := and (or $isV4 (regexMatch (printf "^%s$" (include "websocket-relay.ipv6" .)) $address)) (regexMatch "^[^/]+(/[0-9]{1,3})?$" .) (le $length (ternary 32 128 $isV4)) -}}
{{- if and $isValid (lt $length (ternary 32 128 $isV4)) -}}
{{- /* The groups before ::, after which there are zeros only. */ -}}
{{- $isValid = or $isV4 (hasSuffix "::" $address) (not (contains "::" $address)) -}}
{{- range $index, $group := splitList (ternary "." ":" $isV4) (trimSuffix "::" $address) -}}
{{- $number := printf "value: 0x0%s" $group | fromYaml | dig "value" 0 | int -}}
{{- if $isV4 -}}
{{- $number = int $group -}}
{{- end -}}
{{- $free := sub (mul (add1 $index) $width) $length | max 0 | min $width -}}
{{- range until (int $free) -}}
{{- $isValid = and $isValid (eq (mod $number 2) 0) -}}
{{- $number = div $number 2 -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if $isValid }}true{{ end -}}
{{- end -}}

{{- /* Not empty: an origin that a browser sends, in any case and with a wildcard. */ -}}
{{- define "websocket-relay.isOrigin" -}}
{{- $origin := lower . -}}
{{- $label := `[\pL\pM\pN_-]+` -}}
{{- $ipv4 := include "websocket-relay.ipv4" . -}}
{{- $number := regexMatch `^https?://[^:/\[]*[.][0-9]+[.]?(:|$)|^https?://[0-9]+[.]?(:|$)` $origin -}}
{{- $name := ternary $ipv4 (printf `([*][.])?%s([.]%s)*[.]?` $label $label) $number -}}
{{- $web := printf `https?://([*]|%s|\[%s\])` $name (include "websocket-relay.ipv6" .) -}}
{{- $app := `[a-z][a-z0-9+.-]*://([*][.])?([*]|\[[^\]]*\]|[^\s\pZ\pC/?#@:*%\\\[\]]+)` -}}
{{- $form := ternary $web $app (regexMatch "^https?:" $origin) -}}
{{- if or (has $origin (list "*" "null" "file://")) (and (regexMatch (printf `^%s(:([*]|%s))?$` $form (include "websocket-relay.portNumber" .)) $origin) (not (regexMatch "^(wss?|file):" $origin))) }}true{{ end -}}
{{- end -}}

{{- define "websocket-relay.checks.addresses" -}}
{{- with .Values.config.server }}
{{- if .socket }}
config.server.socket is {{ .socket }}, where neither the Service nor probes connect; leave it empty, and set config.server.port to the port
{{- end }}
{{- if and .proxy_protocol (not .trusted_proxies) (not .socket) }}
config.server.proxy_protocol is true and config.server.trusted_proxies is empty; set config.server.trusted_proxies to the addresses of the proxies
{{- end }}
{{- range .trusted_proxies }}
{{- if not (include "websocket-relay.isNetwork" .) }}
config.server.trusted_proxies has {{ quote . }}, which is neither an address nor the first one of a network; set it to one like 10.0.0.7, or 10.0.0.0/8
{{- end }}
{{- end }}
{{- range .allowed_origins }}
{{- if not (include "websocket-relay.isOrigin" .) }}
config.server.allowed_origins has {{ quote . }}, which no browser sends; set it to the origin of a page, like https://example.com, without a path and not with wss://
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.tls" -}}
{{- with .Values }}
{{- $served := .config.server.tls }}
{{- if and $served.enabled (not .tls.secretName) (not (hasPrefix "/" $served.cert_file)) }}
config.server.tls.enabled is true and tls.secretName is empty; set it to a Secret of type kubernetes.io/tls, or config.server.tls.cert_file and key_file to absolute paths in extraVolumeMounts
{{- end }}
{{- if and .tls.secretName (not $served.enabled) }}
tls.secretName is {{ .tls.secretName }} and config.server.tls.enabled is false, so it would not be used; set config.server.tls.enabled to true, or leave tls.secretName empty
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.tokens" -}}
{{- $auth := .Values.config.auth -}}
{{- $secret := .Values.secrets.jwtSecret.name -}}
{{- $more := .Values.secrets.jwtSecrets.name -}}
{{- $key := .Values.secrets.jwtPublicKey.name -}}
{{- $byKey := or $key $auth.jwt.public_key_file $auth.jwt.jwks_url -}}
{{- $signed := dict "secret" list "key" list -}}
{{- range $auth.jwt.algorithms -}}
{{- $kind := ternary "secret" "key" (hasPrefix "HS" .) -}}
{{- $_ := set $signed $kind (append (get $signed $kind) .) -}}
{{- end -}}
{{- if and (eq $auth.mode "hook") (not $auth.hook.url) }}
config.auth.mode is hook and config.auth.hook.url is empty; set it to the address of your backend
{{- end }}
{{- if not $auth.jwt.algorithms }}
config.auth.jwt.algorithms is empty; set it to the algorithms of the tokens, like [RS256]
{{- end }}
{{- if eq $auth.mode "none" }}
{{- $name := ternary "secrets.jwtSecrets.name" (ternary "secrets.jwtPublicKey.name" "config.auth.jwt" (not (not $key))) (not (not $more)) }}
{{- if or $secret $more $byKey }}
{{ ternary "secrets.jwtSecret.name" $name (not (not $secret)) }} is set and config.auth.mode is none, so no token is required; set config.auth.mode to jwt, or leave the first out
{{- end }}
{{- else if eq $auth.mode "jwt" }}
{{- if and $signed.secret (not $secret) (not $auth.jwt.secret) }}
config.auth.jwt.algorithms has {{ join ", " $signed.secret }} and secrets.jwtSecret.name is empty; set it to the Secret with the shared secret of the tokens, or config.auth.jwt.algorithms to algorithms with public keys
{{- end }}
{{- if and $signed.key (not $byKey) }}
config.auth.jwt.algorithms has {{ join ", " $signed.key }} and there is no public key; set secrets.jwtPublicKey.name to a Secret with one, or config.auth.jwt.jwks_url
{{- end }}
{{- if and $byKey (not $signed.key) }}
{{ ternary "secrets.jwtPublicKey.name" "config.auth.jwt.jwks_url" (not (not $key)) }} is set and config.auth.jwt.algorithms has {{ join ", " $signed.secret }} only, which use no public key; set config.auth.jwt.algorithms to the algorithms of the tokens, like RS256
{{- end }}
{{- if and $auth.jwt.public_key_file $auth.jwt.jwks_url (not $key) }}
config.auth.jwt.public_key_file and config.auth.jwt.jwks_url both set the public keys; leave one of them out
{{- end }}
{{- if and $key (or $auth.jwt.jwks_url $auth.jwt.public_key_file) }}
secrets.jwtPublicKey.name and config.auth.jwt.{{ ternary "jwks_url" "public_key_file" (not (not $auth.jwt.jwks_url)) }} both set the public keys; leave one of them out
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.ways" -}}
{{- with .Values }}
{{- if and .ingress.enabled (not .ingress.hosts) }}
ingress.enabled is true and ingress.hosts is empty; set it to the host names of the relay, like [relay.example.com]
{{- end }}
{{- if and .httpRoute.enabled (not .httpRoute.hostnames) }}
httpRoute.enabled is true and httpRoute.hostnames is empty; set it to the host names of the relay, like [relay.example.com]
{{- end }}
{{- if and .httpRoute.enabled (not .httpRoute.parentRefs) }}
httpRoute.enabled is true and httpRoute.parentRefs is empty; set it to the Gateway of the route, like [{name: public}]
{{- end }}
{{- if and (eq .service.ipFamilyPolicy "RequireDualStack") (regexMatch `^[0-9.]+$` (toString .config.server.host)) }}
service.ipFamilyPolicy is RequireDualStack and config.server.host is {{ .config.server.host }}, an IPv4 address; set config.server.host to ::, or service.ipFamilyPolicy to SingleStack
{{- end }}
{{- if and .service.externalTrafficPolicy (eq .service.type "ClusterIP") }}
service.externalTrafficPolicy is {{ .service.externalTrafficPolicy }} and service.type is ClusterIP, which is not reachable from outside; leave the first empty, or set service.type to NodePort or LoadBalancer
{{- end }}
{{- if and .service.loadBalancerSourceRanges (ne .service.type "LoadBalancer") }}
service.loadBalancerSourceRanges is set and service.type is {{ .service.type }}, so it would have no effect; leave the first empty, or set service.type to LoadBalancer
{{- end }}
{{- if and .serviceMonitor.enabled (not .config.metrics.enabled) }}
serviceMonitor.enabled is true and config.metrics.enabled is false, so there is no port to scrape; set both or neither
{{- end }}
{{- if and .prometheusRule.enabled (not .config.metrics.enabled) }}
prometheusRule.enabled is true and config.metrics.enabled is false, so there are no metrics; set both or neither
{{- end }}
{{- range $section := list "server" "metrics" }}
{{- $host := get $.Values.config $section | dig "host" "" | toString }}
{{- if or (hasPrefix "127." $host) (has $host (list "localhost" "::1")) }}
config.{{ $section }}.host is {{ $host }}, which neither probes nor service.port reach; set config.{{ $section }}.host to 0.0.0.0, or to :: for IPv6
{{- end }}
{{- end }}
{{- if eq (int .config.server.port) 0 }}
config.server.port is 0, any free port, which service.port can't target; set config.server.port to a port
{{- end }}
{{- if and .config.metrics.enabled (eq (int .config.metrics.port) 0) }}
config.metrics.port is 0, any free port, which service.metricsPort and probes can't target; set config.metrics.port to a port
{{- end }}
{{- if and .config.metrics.enabled (eq (int .config.metrics.port) (int .config.server.port)) }}
config.metrics.port and config.server.port are both {{ int .config.server.port }}; set one of them to another port
{{- end }}
{{- if and .config.metrics.enabled (eq .service.type "ClusterIP") (eq (int .service.port) (int .service.metricsPort)) }}
service.port and service.metricsPort are both {{ int .service.port }}; set one of them to another port
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.resources" -}}
{{- $backlog := .Values.config.limits.total_backlog_bytes -}}
{{- with include "websocket-relay.memoryLimit" . }}
{{- if le (float64 .) (float64 $backlog) }}
resources.limits.memory is {{ $.Values.resources.limits.memory }} and config.limits.total_backlog_bytes {{ int64 $backlog }}, so slow clients could use all of the memory and the relay would be killed; set the first to three times the second and more, or the second to less
{{- end }}
{{- end }}
{{- end -}}

{{- /* A duration of Prometheus in seconds. */ -}}
{{- define "websocket-relay.seconds" -}}
{{- $units := dict "ms" 0.001 "s" 1 "m" 60 "h" 3600 "d" 86400 "w" 604800 "y" 31536000 -}}
{{- $total := 0.0 -}}
{{- range regexFindAll "[0-9]+[a-z]+" . -1 -}}
{{- $total = addf $total (mulf (regexFind "[0-9]+" .) (get $units (regexFind "[a-z]+" .))) -}}
{{- end -}}
{{- $total -}}
{{- end -}}

{{- define "websocket-relay.checks.scraping" -}}
{{- with .Values.serviceMonitor }}
{{- if and .enabled (gt (include "websocket-relay.seconds" .scrapeTimeout | float64) (include "websocket-relay.seconds" .interval | float64)) }}
serviceMonitor.scrapeTimeout is {{ .scrapeTimeout }} and serviceMonitor.interval {{ .interval }}, which Prometheus refuses; set the first to less or the second to more
{{- end }}
{{- end }}
{{- end -}}

{{- /* How many of the replicas a number or a percentage is, rounded up as by Kubernetes. */ -}}
{{- define "websocket-relay.partOfReplicas" -}}
{{- $text := toString .value -}}
{{- $number := trimSuffix "%" $text | float64 -}}
{{- ternary (divf (mulf $number .replicas) 100 | ceil) $number (hasSuffix "%" $text) -}}
{{- end -}}

{{- define "websocket-relay.checks.budgets" -}}
{{- $replicas := ternary .Values.autoscaling.minReplicas .Values.replicaCount .Values.autoscaling.enabled | int }}
{{- with .Values.podDisruptionBudget }}
{{- /* Not only null: Helm 4 ignores a null in the values of a parent chart. */}}
{{- $most := not (has (toString .maxUnavailable) (list "" "<nil>")) }}
{{- $least := not (has (toString .minAvailable) (list "" "<nil>")) }}
{{- if and .enabled $most $least }}
podDisruptionBudget.maxUnavailable and podDisruptionBudget.minAvailable are both set; set one of them to ""
{{- end }}
{{- if and .enabled (not $most) (not $least) }}
podDisruptionBudget.enabled is true and neither podDisruptionBudget.maxUnavailable nor podDisruptionBudget.minAvailable is set; set one of them
{{- end }}
{{- if and .enabled $most (eq (include "websocket-relay.partOfReplicas" (dict "value" .maxUnavailable "replicas" 100) | float64) 0.0) }}
podDisruptionBudget.maxUnavailable is {{ .maxUnavailable }}, so no node with a relay could be drained; set it to 1 or more
{{- end }}
{{- if and .enabled $least (not $most) $replicas (ge (include "websocket-relay.partOfReplicas" (dict "value" .minAvailable "replicas" $replicas) | float64) (float64 $replicas)) }}
podDisruptionBudget.minAvailable is {{ .minAvailable }} and the number of replicas {{ $replicas }}, so no node with a relay could be drained; set podDisruptionBudget.minAvailable to "" and podDisruptionBudget.maxUnavailable to 1, or add replicas
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.network" -}}
{{- with .Values }}
{{- if and .networkPolicy.enabled .secrets.backplaneUrl.name (not .networkPolicy.broker.ports) }}
networkPolicy.enabled is true and the broker's port is in the Secret secrets.backplaneUrl.name; set networkPolicy.broker.ports, like [6379]
{{- end }}
{{- end }}
{{- end -}}

{{- define "websocket-relay.checks.environment" -}}
{{- $values := dict -}}
{{- range $value, $variable := include "websocket-relay.secretVariables" . | fromYaml -}}
{{- $_ := set $values (trimSuffix "_FILE" $variable) (printf "secrets.%s" $value) -}}
{{- end -}}
{{- range .Values.extraEnv }}
{{- $variable := upper .name }}
{{- if hasPrefix "RELAY__" $variable }}
{{- $setting := trimPrefix "relay__" (lower .name) | replace "__" "." | printf "config.%s" }}
extraEnv has {{ .name }}, which would override config without being checked; set {{ default $setting (get $values (trimSuffix "_FILE" $variable)) }} instead
{{- end }}
{{- end }}
{{- end -}}
